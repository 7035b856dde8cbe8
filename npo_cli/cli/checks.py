"""What a door checks before anything heavy is imported: a slip in the arguments is answered at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.errors import NpoError, quote_path

if TYPE_CHECKING:
    from npo_cli.config.recipe import Recipe

MAX_DIGITS = 18
"""Of a step on the command line; Python itself refuses to read numbers of some thousand digits."""


def load_run_recipe(
    root: Path, overrides: Sequence[str] | None, *, branch: str | None = None, fork: bool = True
) -> "Recipe":
    """The recipe in force on a branch (the newest without a name), overrides on top; the run must exist.

    A setting that would falsify what the run computed is refused; `fork` where a branch is left, or only looked at.
    """
    from npo_cli.config.loading import override_saved_recipe
    from npo_cli.storage.layout import open_run
    from npo_cli.storage.lineage import find_newest_branch, list_branches

    run = open_run(root)
    if branch is not None and branch not in list_branches(run):
        named = ", ".join(list_branches(run)) or "none yet"
        raise NpoError(f"{root} has no branch {branch!r}: {named}", f"npo show {quote_path(root)} lineage")
    branch = branch or find_newest_branch(run)
    return override_saved_recipe(run.read_recipe(branch), overrides or (), path=run.recipe_path(branch), fork=fork)


def resolve_last_step(until: int | None, recipe: "Recipe", *, after: int, autonpo: bool) -> int:
    """The last step that will be made now; an `--until` that means nothing is refused."""
    last = recipe.train.num_steps
    if until is None:
        return last
    if autonpo:
        raise NpoError(
            "--until does not go with --autonpo, which goes back and forth",
            "set autonpo.max_interventions or train.num_steps",
        )
    if not after < until <= last:
        raise NpoError(f"--until {until} is not between step {after + 1} and {last}", f"--until {last}")
    return until


def parse_steps(text: str) -> tuple[int, ...]:
    """`20,40,60` as steps."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < MAX_DIGITS for part in parts):
        raise NpoError(f"--candidates takes steps apart by commas, got {text!r}", "--candidates 20,40,60")
    return tuple(map(int, parts))
