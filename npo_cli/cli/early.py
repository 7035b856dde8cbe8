"""What a door checks before anything heavy is imported: a slip in the arguments is answered at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.errors import NpoError

if TYPE_CHECKING:
    from npo_cli.config import Recipe


def recipe_of(root: Path, overrides: Sequence[str] | None, *, branch: str | None = None) -> "Recipe":
    """The recipe in force on a branch (the newest without a name), overrides on top; the run must exist."""
    from npo_cli.loading import from_dict, with_overrides
    from npo_cli.run_dir.lineage import branches, newest_branch
    from npo_cli.run_dir.paths import open_run

    run = open_run(root)
    if branch is not None and branch not in branches(run):
        raise NpoError(f"{root} has no branch {branch!r}: {', '.join(branches(run))}", f"npo show {root} lineage")
    return with_overrides(from_dict(run.recipe(branch or newest_branch(run))), overrides or ())


def changed_recipe(root: Path, overrides: Sequence[str] | None, *, branch: str | None, fork: bool) -> "Recipe":
    """The same for a branch that goes on or is left: a setting that must not change is refused."""
    from npo_cli.loading import refuse_frozen

    changed = recipe_of(root, overrides, branch=branch)
    refuse_frozen(recipe_of(root, None, branch=branch), changed, fork=fork)
    return changed


def steps_in(text: str) -> tuple[int, ...]:
    """`20,40,60` as steps."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise NpoError(f"--candidates takes steps apart by commas, got {text!r}", "--candidates 20,40,60")
    return tuple(map(int, parts))
