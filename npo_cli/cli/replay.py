"""`npo replay`."""

from functools import partial
from typing import Annotated

import typer

from npo_cli.cli.checks import parse_steps
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, DryRunOpt, FullOpt, JsonOpt, OverridesArg, RunArg, UntilOpt
from npo_cli.cli.output import print_plan, print_records

StepsOpt = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help="Steps with the guide. [default: up to the guide, or the rest of the run]"
    ),
]
NameOpt = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of guide cache and branch. [default: replay-STEP]"),
]


def replay(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: Annotated[int, typer.Option("--at", min=0, metavar="STEP", help="Learner step.", show_default=False)],
    candidates: Annotated[
        str | None,
        typer.Option("--candidates", metavar="STEPS", help="Later checkpoints, such as 60,80. [default: all]"),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="SPEC", help="Any guide source (npo sample-guide --help); repeatable."),
    ] = None,
    name: NameOpt = None,
    branch: BranchOpt = None,
    steps: StepsOpt = None,
    until: UntilOpt = None,
    allow_code: AllowCodeOpt = False,
    dry_run: DryRunOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Score guide candidates, sample the chosen one, and train a branch with it.

    The same as score-checkpoints, sample-guide and resume, one after the other. Where the scoring finds no guide worth
    it, the command ends there, with exit code 0. Repeated after an interruption it continues where it stopped.
    """
    later = () if candidates is None else parse_steps(candidates)

    from npo_cli.api.training import replay as replay_run

    records = replay_run.stream(
        run,
        at=at,
        candidates=[*later, *(source or ())] or None,
        name=name,
        branch=branch,
        steps=steps,
        until=until,
        overrides=overrides or (),
    )
    if dry_run:
        print_plan(records.plan(), as_json=as_json)
        return
    from npo_cli.report.conclusions import conclude_replay

    conclude = partial(conclude_replay, run, at, branch, name)
    print_records(records, as_json=as_json, num_steps=records.last_step, full=full, conclude=conclude)
