"""`npo train`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.checks import resolve_last_step
from npo_cli.cli.options import AllowCodeOpt, JsonOpt, OverridesArg, RecipeArg, UntilOpt
from npo_cli.cli.output import print_records


def train(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    *,
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="New run directory.", show_default=False)],
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="Method on top of the recipe (npo recipes --methods)."),
    ] = None,
    until: UntilOpt = None,
    autonpo: Annotated[
        bool, typer.Option("--autonpo", help="Let AutoNPO watch, roll back and replay (as npo resume --autonpo).")
    ] = False,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a GRPO baseline from a recipe.

    Checkpoints, metrics and rollouts are written to the run directory as it goes.
    """
    from npo_cli.config.loading import load_recipe
    from npo_cli.storage.layout import check_unused

    resolved = load_recipe(recipe, overrides or (), method=method)
    check_unused(run)
    last = resolve_last_step(until, resolved, after=-1, autonpo=autonpo)
    from npo_cli.training.tracking import track_records

    if autonpo:
        from npo_cli.autonpo.run import train_autonpo

        records = train_autonpo(run, resolved)
    else:
        from npo_cli.training.train import train_run

        records = train_run(run, resolved, until=until)
    print_records(track_records(run, resolved, records), as_json=as_json, num_steps=last)
