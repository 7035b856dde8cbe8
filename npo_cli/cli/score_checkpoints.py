"""`npo score-checkpoints`."""

from typing import Annotated

import typer

from npo_cli.cli.checks import load_run_recipe, parse_steps
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_records


def score_checkpoints(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: Annotated[
        int | None,
        typer.Option("--at", min=0, metavar="STEP", help="Step of the learner. [default: guide.replay.at_step]"),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option("--candidates", metavar="STEPS", help="Such as 20,40,60. [default: every later step]")
    ] = None,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Rank later checkpoints as guides by S = Q/V.

    Q, V and S of every candidate for the policy at STEP, each with an interval.
    """
    chosen = None if candidates is None else parse_steps(candidates)
    load_run_recipe(run, overrides, branch=branch)

    from npo_cli.guides.score import score_run

    records = score_run(run, at=at, candidates=chosen, branch=branch, overrides=overrides or ())
    print_records(records, as_json=as_json)
