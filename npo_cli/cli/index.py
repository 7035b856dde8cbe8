"""`npo index`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import AllowCodeOpt, FullOpt, JsonOpt, OnlyBranchOpt, OverridesArg, RunArg, make_results_option
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path
from npo_cli.types.rollouts import CheckpointEntry

ImportOpt = Annotated[
    Path | None,
    typer.Option(
        "--import", metavar="FOLDER", help="Create RUN from the checkpoints of TRL, verl or prime-rl in FOLDER."
    ),
]
RecipeOpt = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="import: recipe with the task, batch size and sampling settings."),
]
MetricsOpt = Annotated[
    Path | None,
    typer.Option("--metrics", metavar="FILE", help="import: metrics of the trainer. [default: searched in FOLDER]"),
]
BaseOpt = Annotated[bool, typer.Option("--with-base", help="import: save the recipe's model.path as step 0.")]


def index(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    branch: OnlyBranchOpt = None,
    folder: ImportOpt = None,
    recipe: RecipeOpt = None,
    metrics: MetricsOpt = None,
    base: BaseOpt = False,
    allow_code: AllowCodeOpt = False,
    out: Annotated[Path | None, make_results_option("the table of checkpoints")] = None,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """List checkpoints, or import those of another trainer.

    Shows step, branch, parent, kind, size, digest, reward, entropy, accuracy, and the newest Q, V and S.
    """
    given = {"KEY=VALUE": overrides, "--recipe": recipe, "--metrics": metrics, "--with-base": base}
    for name, value in given.items():
        if value and folder is None:
            raise NpoError(f"{name} needs --import", f"npo index {quote_path(run)} --import FOLDER --recipe RECIPE")
    if folder is not None and branch is not None:
        raise NpoError("--branch is not available with --import", "an imported run has the branch main")
    if folder is None:
        from npo_cli.report.conclusions import conclude_index
        from npo_cli.storage.index import index_run

        conclude = partial(conclude_index, run)
        print_records(
            index_run(run, branch=branch),
            as_json=as_json,
            full=full,
            conclude=conclude,
            out=out,
            saved_as=CheckpointEntry,
        )
        return
    if recipe is None:
        again = f"npo index {quote_path(run)} --import {quote_path(folder)}"
        raise NpoError("--import needs --recipe: checkpoints do not record their task", f"{again} --recipe R")

    from npo_cli.interop.import_run import ImportSpec, import_run

    spec = ImportSpec(
        source_folder=folder, recipe=recipe, overrides=tuple(overrides or ()), metrics=metrics, saves_base=base
    )
    from npo_cli.report.conclusions import conclude_index

    print_records(
        import_run(run, spec),
        as_json=as_json,
        full=full,
        conclude=partial(conclude_index, run),
        out=out,
        saved_as=CheckpointEntry,
    )
