"""What the shell offers after Tab: recipes, methods, settings, branches, guides, steps.

Files and names are listed, nothing is opened with torch. A callback that cannot answer, as for a run that does not
exist, offers nothing: an error would be printed into the command line.
"""

import os
import shlex
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from npo_cli.storage.layout import RunDir

WORDS_VARIABLES = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
Completer = Callable[[typer.Context, str], list[str]]


def offers(list_values: Callable[[typer.Context, str], Iterable[str]]) -> Completer:
    """Decorator: the values that begin with what is typed; none where listing them fails."""

    @wraps(list_values)
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [value for value in list_values(ctx, incomplete) if value.startswith(incomplete)]
        except Exception:
            return []

    return complete


@offers
def complete_recipe(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Shipped recipes, recipe files, and folders on the way to them."""
    from npo_cli.config.locate import list_recipe_names

    yield from list_recipe_names()
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        shown = str(path)
        if path.is_dir():
            yield f"{shown}/"
        elif path.suffix in (".yaml", ".yml"):
            yield shown


@offers
def complete_method(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Shipped methods."""
    from npo_cli.config.locate import list_method_names

    return list_method_names()


@offers
def complete_setting(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """`train.lr=`"""
    return (f"{key}=" for key in _list_keys())


@offers
def complete_key(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """`train` and `train.lr`."""
    keys = _list_keys()
    return [*dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key), *keys]


@offers
def complete_branch(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Branches of the run."""
    from npo_cli.storage.layout import list_folders

    return [folder.name for folder in list_folders(_open_run(ctx).branches_folder)]


@offers
def complete_guide(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Guide caches of the run."""
    from npo_cli.storage.layout import list_folders

    return [folder.name for folder in list_folders(_open_run(ctx).guides_folder)]


@offers
def complete_step(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Steps with a checkpoint, on any branch, or on that of --branch and its ancestors."""
    return map(str, _list_steps(ctx))


@offers
def complete_steps(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """The same for `60,80,...`: steps after the last comma that are not in the list."""
    before, comma, _ = incomplete.rpartition(",")
    return (f"{before}{comma}{step}" for step in _list_steps(ctx) if str(step) not in before.split(","))


@offers
def complete_source(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Steps, and the names of guide sources."""
    from npo_cli.registry import GUIDE_SOURCES

    return [*map(str, _list_steps(ctx)), *GUIDE_SOURCES.names()]


def _list_keys() -> list[str]:
    from npo_cli.config.base import list_settings
    from npo_cli.config.describe import list_sections

    return [f"{prefix}{name}" for prefix, section in list_sections() for name, *_ in list_settings(section)]


def _list_steps(ctx: typer.Context) -> list[int]:
    from npo_cli.storage.checkpoints import list_ancestry_checkpoints
    from npo_cli.storage.lineage import list_branches

    run, words = _open_run(ctx), _typed_words()
    branch = next((value for option, value in pairwise(words) if option == "--branch"), None)
    branches = [branch] if branch else list_branches(run)
    return sorted({found.step for name in branches for found in list_ancestry_checkpoints(run, name)})


def _open_run(ctx: typer.Context) -> "RunDir":
    """The run directory among the typed words: arguments before an option without its value are not parsed."""
    from npo_cli.storage.layout import is_run_directory, open_run

    return open_run(next(path for path in map(Path, _typed_words()) if is_run_directory(path)))


def _typed_words() -> list[str]:
    """The command line, from the variable that the shell's completion script sets."""
    for name in WORDS_VARIABLES:
        if name in os.environ:
            return shlex.split(os.environ[name])
    return []
