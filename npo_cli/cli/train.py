"""`npo train`."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import AllowCodeOpt, DryRunOpt, FullOpt, JsonOpt, MethodOpt, OverridesArg, RecipeArg, UntilOpt
from npo_cli.cli.output import print_plan, print_records
from npo_cli.cli.terminal import escape_for_terminal, print_notice
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError, quote_path

RUNS_FOLDER = Path("runs")
SETTING = re.compile(r"[^/=]*=")
"""KEY=VALUE; a path with a slash before its `=` is a run directory."""
"""Where run directories without a given name are created."""

NewRunArg = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="New run directory. [default: runs/RECIPE-N]", show_default=False),
]
RunOpt = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="The same as the argument RUN (not under torchrun).", show_default=False),
]
AutonpoOpt = Annotated[bool, typer.Option("--autonpo", help="Train with AutoNPO, as npo resume --autonpo does.")]


def train(
    recipe: RecipeArg,
    run: NewRunArg = None,
    overrides: OverridesArg = None,
    *,
    run_option: RunOpt = None,
    method: MethodOpt = None,
    until: UntilOpt = None,
    autonpo: AutonpoOpt = False,
    allow_code: AllowCodeOpt = False,
    dry_run: DryRunOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a GRPO baseline from a recipe.

    Checkpoints, metrics and rollouts are written to the run directory during training.
    """
    from npo_cli.config.loading import load_recipe
    from npo_cli.storage.layout import check_unused

    positional = [*([] if run is None else [run]), *(overrides or ())]
    given, settings = split_arguments(positional, run=run_option)
    resolved = load_recipe(recipe, settings, method=method)

    def find_run_directory() -> Path:
        root = given or choose_run_directory(recipe)
        check_unused(root)
        return root

    # Of several processes one looks: it creates the directory before the others may have looked.
    root = current_group().run_on_main(find_run_directory, phase="name the run")
    from npo_cli.api.training import train as train_run

    records = train_run.stream(resolved, root, until=until, autonpo=autonpo)
    if dry_run:
        print_plan(records.plan(), as_json=as_json)
        return
    if given is None:
        print_notice(escape_for_terminal(f"run directory: {root}"))
    from npo_cli.report.conclusions import conclude_training

    conclude = partial(conclude_training, root)
    print_records(records, as_json=as_json, num_steps=records.last_step, full=full, conclude=conclude)


def split_arguments(arguments: Sequence[str], *, run: Path | None) -> tuple[Path | None, Sequence[str]]:
    """RUN, or None, and the settings: a first argument that is no KEY=VALUE is RUN."""
    if not arguments or SETTING.match(arguments[0]):
        return run, arguments
    if run is not None:
        raise NpoError(
            f"the run directory is given twice: {arguments[0]} and --run {run}",
            f"--run {quote_path(run)}   # or the argument alone",
        )
    if not arguments[0]:
        raise NpoError("the run directory is an empty name", "npo train micro runs/first")
    return Path(arguments[0]), arguments[1:]


def choose_run_directory(recipe: str) -> Path:
    """`runs/NAME-N` with the recipe's name and the lowest N that does not exist yet."""
    name, number = Path(recipe).stem, 1
    while (RUNS_FOLDER / f"{name}-{number}").exists():
        number += 1
    return RUNS_FOLDER / f"{name}-{number}"
