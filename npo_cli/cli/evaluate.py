"""`npo eval`."""

from functools import partial
from typing import Annotated

import typer

from npo_cli.cli.options import AllowCodeOpt, BranchOpt, FullOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_records


def evaluate(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, metavar="N", help="Step of the checkpoint. [default: the last]"),
    ] = None,
    every_step: Annotated[bool, typer.Option("--all", help="Every checkpoint of the branch.")] = False,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Evaluate checkpoints on the held-out prompts.

    avg@k and pass@k, with 95 % intervals over prompts.
    """
    from npo_cli.api.training import evaluate as evaluate_run

    records = evaluate_run.stream(run, step=step, every_step=every_step, branch=branch, overrides=overrides or ())
    from npo_cli.report.verdicts import conclude_eval

    print_records(records, as_json=as_json, full=full, conclude=partial(conclude_eval, run))
