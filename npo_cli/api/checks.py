"""Checks of arguments before any heavy import, so that a mistake is reported at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npo_cli.errors import NpoError, quote_path

if TYPE_CHECKING:
    from npo_cli.config.loading import Purpose
    from npo_cli.config.recipe import Recipe

Overrides = Sequence[str] | Mapping[str, Any]
"""Settings as `KEY=VALUE` texts, or by dotted key, or by section."""
FIGURE_FORMATS = (".png", ".svg", ".pdf")
RESULT_FORMATS = (".csv", ".json", ".jsonl")


def list_overrides(overrides: Overrides) -> list[str]:
    """Settings as `KEY=VALUE` texts."""
    from npo_cli.config.loading import format_override

    if isinstance(overrides, Mapping):
        return [format_override(key, value) for key, value in overrides.items()]
    if isinstance(overrides, str):
        raise NpoError("overrides must be a list of settings, got one text", f"overrides=[{overrides!r}]")
    return list(overrides)


def load_run_recipe(
    root: Path,
    overrides: Sequence[str] | None,
    *,
    branch: str | None = None,
    purpose: "Purpose" = "measure",
    hint: str = "",
) -> "Recipe":
    """The recipe of a branch (None: main) with overrides applied; the run and the branch must exist.

    Changes of settings that earlier steps depend on are refused, by `purpose` (see `check_frozen_settings`).
    `hint` replaces the default hint of the error about an unknown branch.
    """
    from npo_cli.config.loading import override_saved_recipe
    from npo_cli.storage.layout import open_run
    from npo_cli.storage.lineage import find_main_branch, list_branches

    run = open_run(root)
    if branch is not None and branch not in list_branches(run):
        names = ", ".join(list_branches(run)) or "none yet"
        raise NpoError(f"{root} has no branch {branch!r}: {names}", hint or f"npo show {quote_path(root)} lineage")
    branch = branch or find_main_branch(run)
    return override_saved_recipe(
        run.read_recipe(branch), overrides or (), path=run.recipe_path(branch), purpose=purpose
    )


def resolve_last_step(until: int | None, recipe: "Recipe", *, after: int, autonpo: bool) -> int:
    """The last step of this training: `--until`, or the recipe's number of steps."""
    last = recipe.train.num_steps
    if until is None:
        return last
    if autonpo:
        raise NpoError(
            "--until is not available with --autonpo, which rolls back and trains steps again",
            "set autonpo.max_interventions or train.num_steps",
        )
    if not after < until <= last:
        raise NpoError(f"--until {until} is not between step {after + 1} and {last}", f"--until {last}")
    return until


def check_figure_path(path: Path | None, *, option: str = "--figure", formats: Sequence[str] = FIGURE_FORMATS) -> None:
    """Refuse a path that is a folder, or whose suffix names no picture format."""
    _check_file(path, option, formats, example="figure.png")


def check_results_path(path: Path | None) -> None:
    """Refuse a path that is a folder, or whose suffix names no format of results."""
    _check_file(path, "--out", RESULT_FORMATS, example="results.csv")


def _check_file(path: Path | None, option: str, formats: Sequence[str], *, example: str) -> None:
    if path is None:
        return
    if path.is_dir():
        raise NpoError(f"{option} {path} is a folder", f"{option} {quote_path(path / example)}")
    if path.suffix.lower() not in formats:
        suffix = Path(example).suffix
        raise NpoError(f"{option} {path} must end in {', '.join(formats)}", f"{option} {quote_path(path)}{suffix}")
