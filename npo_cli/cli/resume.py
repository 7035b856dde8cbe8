"""`npo resume`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.checks import load_run_recipe, resolve_last_step
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, OverridesArg, RunArg, UntilOpt
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path

ForkAtOpt = Annotated[int | None, typer.Option("--at", min=0, metavar="STEP", help="Fork a new branch at this step.")]
GuideOpt = Annotated[
    str | None,
    typer.Option("--guide", metavar="NAME", help="Inject responses of this guide cache (npo sample-guide)."),
]
NewBranchOpt = Annotated[str | None, typer.Option("--new-branch", metavar="NAME", help="Name of the new branch.")]
StepsOpt = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Number of steps with the guide after --at.")
]
AutonpoOpt = Annotated[bool, typer.Option("--autonpo", help="Let AutoNPO decide when and how far to roll back.")]
FreshOpt = Annotated[
    bool, typer.Option("--fresh-optimizer", help="Fork from weights only; start with a new optimizer state.")
]


def resume(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: ForkAtOpt = None,
    guide: GuideOpt = None,
    branch: BranchOpt = None,
    new_branch: NewBranchOpt = None,
    steps: StepsOpt = None,
    until: UntilOpt = None,
    autonpo: AutonpoOpt = False,
    fresh: FreshOpt = False,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Resume training, or fork from an earlier step.

    Without --at, training continues from the newest training state of the branch. With --at and --guide, a new branch
    is forked at that step and trained with the guide; existing files are never overwritten.
    With --autonpo, AutoNPO reads the recorded steps, then controls the training; with --at it starts at that step, on a
    new branch (npo autonpo RUN --explain is a dry run).
    Settings that earlier steps depend on cannot change; train.num_steps may be raised.
    """
    hint = "" if branch is None or at is None else f"--new-branch {quote_path(Path(branch))}   # names a new branch"
    recipe = load_run_recipe(run, overrides, branch=branch, fork=at is not None, hint=hint)
    last = resolve_last_step(until, recipe, after=at or 0, autonpo=autonpo)
    _check_combination(run, at=at, autonpo=autonpo, fresh=fresh, has_guide=guide is not None or steps is not None)
    from npo_cli.training.tracking import track_records

    where = {"overrides": overrides or (), "at": at, "source_branch": branch, "new_branch": new_branch}
    if autonpo:
        from npo_cli.autonpo.run import resume_autonpo

        records = resume_autonpo(run, **where)
    else:
        from npo_cli.training.resume import resume_run

        records = resume_run(run, **where, guide=guide, steps=steps, until=until, fresh=fresh)
    print_records(track_records(run, recipe, records), as_json=as_json, num_steps=last)


def _check_combination(run: Path, *, at: int | None, autonpo: bool, fresh: bool, has_guide: bool) -> None:
    if fresh and (at is None or autonpo):
        raise NpoError(
            "--fresh-optimizer needs --at STEP, and is not available with --autonpo",
            f"npo resume {quote_path(run)} --at STEP --fresh-optimizer",
        )
    if autonpo and has_guide:
        raise NpoError(
            "--guide and --steps are not available with --autonpo, which builds its own guide caches",
            f"npo resume {quote_path(run)} --autonpo",
        )
