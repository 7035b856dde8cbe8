"""The guide sources of this package, one class per file (two or three where they share most of their code).

Each is registered in `npo_cli.registry.GUIDE_SOURCES`; sources of other packages are entry points.
Knows nothing of guide caches and scoring, which use any source alike.
"""
