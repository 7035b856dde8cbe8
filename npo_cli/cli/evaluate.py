"""`npo eval`."""

from typing import Annotated

import typer

from npo_cli.cli.checks import load_run_recipe
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError


def evaluate(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    step: Annotated[
        int | None, typer.Option("--step", min=0, metavar="N", help="Step of the checkpoint. [default: newest]")
    ] = None,
    every_step: Annotated[bool, typer.Option("--all", help="Every checkpoint of the branch.")] = False,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Evaluate checkpoints on the held-out prompts.

    avg@k and pass@k, with 95 % intervals over prompts.
    """
    if every_step and step is not None:
        raise NpoError("--step and --all cannot be combined", "give one of them, or neither for the newest checkpoint")
    load_run_recipe(run, overrides, branch=branch)

    from npo_cli.training.evaluate import evaluate_run

    records = evaluate_run(run, step=step, every_step=every_step, branch=branch, overrides=overrides or ())
    print_records(records, as_json=as_json)
