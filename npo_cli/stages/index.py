"""`npo index`: one table of the run's checkpoints."""

from pathlib import Path

from npo_cli.records import CheckpointEntry
from npo_cli.run_dir.index import build_index
from npo_cli.run_dir.paths import open_run


def index_run(root: Path, *, verify: bool) -> list[CheckpointEntry]:
    """Rebuild the index from what lies on the disk; `verify` reads every byte and compares digests."""
    return build_index(open_run(root), verify=verify)
