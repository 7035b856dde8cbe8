"""Branches as pictures need them: where each one left its parent, who guided it, how far it came."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchSpan:
    """One branch of the lineage tree."""

    branch: str
    parent: str | None
    fork_step: int
    last_step: int
    """Newest step on record; `fork_step` where there is none."""
    lineage_until: int | None
    """Last of its own steps on the line of descent that the report follows; None where none is."""
    guide_cache: str | None
    guide_step: int | None
    """Step of the checkpoint that guided; None without a guide, or where its cache is gone."""
    guide_until: int | None
    """Last step at which the guide was mixed in."""
