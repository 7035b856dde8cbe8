"""Guides: where off-policy responses come from, how they are sampled, cached and scored.

One class per guide source (`sources/`), one base class (`source.py`), one grammar of SPEC (`registry.py`).
Knows nothing of updates and losses: training uses what is cached or sampled here.
"""
