"""Arguments and options that several commands share, and the names that replaced older ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from npo_cli.cli.completion import (
    complete_branch,
    complete_method,
    complete_recipe,
    complete_setting,
    complete_step,
)


def _permit_code(is_allowed: bool) -> bool:
    if is_allowed:
        from npo_cli.tasks.custom_verifier import permit_code

        permit_code()
    return is_allowed


def _check_results(path: Path | None) -> Path | None:
    from npo_cli.api.checks import check_results_path

    check_results_path(path)
    return path


def _check_figure(path: Path | None) -> Path | None:
    from npo_cli.api.checks import check_figure_path

    check_figure_path(path)
    return path


def make_results_option(what: str) -> Any:
    """`--out FILE`, the same in every command that prints results."""
    text = f"Save {what} (.csv; .json or .jsonl: everything that --json prints)."
    return typer.Option("--out", metavar="FILE", callback=_check_results, help=text)


def make_figure_option(what: str) -> Any:
    """`--figure FILE`, the same in every command that draws a picture."""
    return typer.Option("--figure", metavar="FILE", callback=_check_figure, help=f"Save {what} (.png, .svg or .pdf).")


RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)]
RecipeArg = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="Recipe file, or name of a shipped recipe (npo recipes).", autocompletion=complete_recipe
    ),
]
OverridesArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override settings of the recipe, such as train.lr=3e-4.",
        autocompletion=complete_setting,
    ),
]
MethodOpt = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="Apply this method to the recipe (npo recipes --methods).",
        autocompletion=complete_method,
    ),
]
AtOpt = Annotated[
    int | None,
    typer.Option(
        "--at",
        min=0,
        metavar="STEP",
        help="Learner step. [default: guide.replay.at_step]",
        autocompletion=complete_step,
    ),
]
BranchOpt = Annotated[
    str | None,
    typer.Option(
        "--branch", metavar="NAME", help="Existing branch of the run. [default: main]", autocompletion=complete_branch
    ),
]
OnlyBranchOpt = Annotated[
    str | None,
    typer.Option(
        "--branch",
        metavar="NAME",
        help="Only this branch. [default: all]",
        autocompletion=complete_branch,
    ),
]
UntilOpt = Annotated[
    int | None,
    typer.Option("--until", min=0, metavar="STEP", help="Stop after this step and save a checkpoint."),
]
AllowCodeOpt = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        callback=_permit_code,
        help="Allow the recipe to import and run a custom verifier; needed once per run and content of the file.",
    ),
]
DryRunOpt = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what would be done and what it would cost, with all checks; write nothing."),
]
JSON_FLAG = "--json"
FullOpt = Annotated[bool, typer.Option("--full", help="Tables with every column and row.")]
JsonOpt = Annotated[bool, typer.Option(JSON_FLAG, help="Print JSON lines on stdout and nothing else, errors included.")]

OLD_COMMANDS = {
    "base": "python recipes/make_micro_base.py OUT",
    "score-sources": "npo score-checkpoints RUN --source SPEC",
}
"""Removed command -> what replaces it."""
OLD_OPTIONS = {
    ("resume", "--from"): "--branch {value}",
    ("sample-guide", "--guide"): "--source {value}",
    ("sample-guide", "--from"): "--source SPEC, such as model:{value}",
    ("sample-guide", "--model"): "--source endpoint:URL#{value}",
    ("score-checkpoints", "--far"): "--source checkpoint:{value}",
    ("score-checkpoints", "--guide"): "--source {value}",
    ("compare", "--csv"): "--out {value}",
    ("report", "--pictures"): "--figures {value}",
    ("index", "--base"): "--with-base",
    ("index", "--verify"): "npo verify RUN",
}
"""(command, removed option) -> the option that replaces it; `{value}` is what was given."""


def suggest_new_option(command: str, option: str, args: Sequence[str]) -> str | None:
    """`--source 100` for `sample-guide --guide 100`; None for an option that never existed."""
    new = OLD_OPTIONS.get((command, option))
    if new is None:
        return None
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == option:
            following = args[place + 1] if place + 1 < len(args) else "VALUE"
            return new.format(value=value if equals else following)
    return new.format(value="VALUE")
