"""`npo resume`."""

from functools import partial
from typing import Annotated

import typer

from npo_cli.cli.completion import complete_guide, complete_step
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, DryRunOpt, FullOpt, JsonOpt, OverridesArg, RunArg, UntilOpt
from npo_cli.cli.output import print_plan, print_records

ForkAtOpt = Annotated[
    int | None,
    typer.Option(
        "--at",
        min=0,
        metavar="STEP",
        help="Fork a new branch at this step.",
        autocompletion=complete_step,
    ),
]
GuideOpt = Annotated[
    str | None,
    typer.Option(
        "--guide",
        metavar="NAME",
        help="Inject responses of this guide cache (npo sample-guide).",
        autocompletion=complete_guide,
    ),
]
NoGuideOpt = Annotated[
    bool, typer.Option("--no-guide", help="Fork at --at without a guide cache: plain training from that step.")
]
NewBranchOpt = Annotated[str | None, typer.Option("--new-branch", metavar="NAME", help="Name of the new branch.")]
StepsOpt = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Number of steps with the guide after --at.")
]
AutonpoOpt = Annotated[bool, typer.Option("--autonpo", help="Let AutoNPO decide when and how far to roll back.")]
FreshOpt = Annotated[
    bool, typer.Option("--fresh-optimizer", help="Fork from weights only; start with a new optimizer state.")
]
MergeOpt = Annotated[
    str | None,
    typer.Option(
        "--merge",
        metavar="SPEC",
        help="Start the new branch from merged weights, theta + W (plus - minus): "
        "BRANCH:STEP[,minus=BRANCH:STEP],weight=W. theta is the checkpoint at --at, and minus by default.",
    ),
]


def resume(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: ForkAtOpt = None,
    guide: GuideOpt = None,
    no_guide: NoGuideOpt = False,
    branch: BranchOpt = None,
    new_branch: NewBranchOpt = None,
    steps: StepsOpt = None,
    until: UntilOpt = None,
    autonpo: AutonpoOpt = False,
    fresh: FreshOpt = False,
    merge: MergeOpt = None,
    allow_code: AllowCodeOpt = False,
    dry_run: DryRunOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Resume training, or fork from an earlier step.

    Without --at, training continues on the branch that was interrupted; if none was, on main. With --at, a new branch
    is forked at that step (of the branch that the guide is for, else of main) and trained with the guide of --guide, or
    with --no-guide without one; existing files are never overwritten.
    With --autonpo, AutoNPO reads the recorded steps, then controls the training; with --at it starts at that step, on a
    new branch (npo autonpo RUN --explain is a dry run).
    Settings that earlier steps depend on cannot change; train.num_steps may be raised.
    """
    from npo_cli.api.training import resume as resume_run

    records = resume_run.stream(
        run,
        at=at,
        guide=guide,
        no_guide=no_guide,
        branch=branch,
        new_branch=new_branch,
        steps=steps,
        until=until,
        autonpo=autonpo,
        fresh_optimizer=fresh,
        merge=merge,
        overrides=overrides or (),
    )
    if dry_run:
        print_plan(records.plan(), as_json=as_json)
        return
    from npo_cli.report.conclusions import conclude_training

    conclude = partial(conclude_training, run)
    print_records(records, as_json=as_json, num_steps=records.last_step, full=full, conclude=conclude)
