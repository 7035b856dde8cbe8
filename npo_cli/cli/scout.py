"""`npo scout`."""

from functools import partial
from typing import Annotated

import typer

from npo_cli.cli.completion import complete_step
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, DryRunOpt, FullOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_plan, print_records

AtOpt = Annotated[
    int,
    typer.Option(
        "--at",
        min=0,
        metavar="STEP",
        help="Step that the scout starts from.",
        autocompletion=complete_step,
        show_default=False,
    ),
]
StepsOpt = Annotated[
    int | None,
    typer.Option("--steps", min=1, metavar="N", help="Maximum number of steps. [default: scout.num_steps]"),
]
NameOpt = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Name of the scout's branch. [default: scout-STEP]")
]


def scout(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: AtOpt,
    steps: StepsOpt = None,
    name: NameOpt = None,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    dry_run: DryRunOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a disposable scout: a branch that is only a guide and a teacher.

    It has settings of its own (scout.lr, scout.num_updates, ...; npo config scout), and is used as guide source or
    teacher scout:NAME. The branch that learns from it pays for it; then its checkpoints are dropped (scout.keep).
    Repeated after an interruption, the command continues where it stopped.
    """
    from npo_cli.api.training import scout as scout_run

    records = scout_run.stream(run, at=at, steps=steps, name=name, branch=branch, overrides=overrides or ())
    if dry_run:
        print_plan(records.plan(), as_json=as_json)
        return
    from npo_cli.report.conclusions import conclude_named_scout

    conclude = partial(conclude_named_scout, run, records.branch)
    print_records(records, as_json=as_json, num_steps=records.last_step, full=full, conclude=conclude)
