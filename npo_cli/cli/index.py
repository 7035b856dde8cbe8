"""`npo index`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import AllowCodeOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path

ImportOpt = Annotated[
    Path | None,
    typer.Option("--import", metavar="FOLDER", help="Make RUN from the checkpoints of TRL, verl or prime-rl in it."),
]
RecipeOpt = Annotated[
    str | None, typer.Option("--recipe", metavar="RECIPE", help="import: recipe with the task, the batch and sampling.")
]
MetricsOpt = Annotated[
    Path | None, typer.Option("--metrics", metavar="FILE", help="import: its records. [default: found beside them]")
]
BaseOpt = Annotated[bool, typer.Option("--base", help="import: save the recipe's model.path as step 0.")]


def index(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare with the digests.")] = False,
    source: ImportOpt = None,
    recipe: RecipeOpt = None,
    metrics: MetricsOpt = None,
    base: BaseOpt = False,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """List a run's checkpoints, or import another trainer's.

    Step, branch, parent, tier, size, digest, reward and entropy, accuracy, and Q, V and S once scored.
    """
    given = {"KEY=VALUE": overrides, "--recipe": recipe, "--metrics": metrics, "--base": base}
    for name, value in given.items():
        if value and source is None:
            raise NpoError(
                f"{name} belongs to --import", f"npo index {quote_path(run)} --import FOLDER --recipe RECIPE"
            )
    if source is None:
        from npo_cli.storage.index import index_run

        print_records(index_run(run, verify=verify), as_json=as_json)
        return
    if recipe is None:
        again = f"npo index {quote_path(run)} --import {quote_path(source)}"
        raise NpoError("checkpoints do not say what task they were trained on: --recipe does", f"{again} --recipe R")

    from npo_cli.interop.import_run import ImportSpec, import_run

    asked = ImportSpec(
        source_folder=source, recipe=recipe, overrides=tuple(overrides or ()), metrics=metrics, saves_base=base
    )
    print_records(import_run(run, asked), as_json=as_json)
