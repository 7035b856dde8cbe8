"""`npo resume`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.checks import load_run_recipe, resolve_last_step
from npo_cli.cli.options import AllowCodeOpt, JsonOpt, OverridesArg, RunArg, UntilOpt
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path

AtOpt = Annotated[int | None, typer.Option("--at", min=0, metavar="STEP", help="Roll back to this step.")]
GuideOpt = Annotated[
    str | None, typer.Option("--guide", metavar="NAME", help="Guide cache to mix into the replay (npo sample-guide).")
]
FromOpt = Annotated[
    str | None, typer.Option("--from", metavar="BRANCH", help="Branch to go on with or to leave. [default: newest]")
]
NewBranchOpt = Annotated[str | None, typer.Option("--branch", metavar="NEWNAME", help="Name of the new branch.")]
StepsOpt = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Steps for which the guide is mixed in.")
]
AutoOpt = Annotated[
    bool, typer.Option("--autonpo", help="Let AutoNPO decide when and how far to roll back, and do it.")
]
FreshOpt = Annotated[
    bool, typer.Option("--fresh-optimizer", help="Roll back to weights alone: of an import, or without its state.")
]


def resume(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: AtOpt = None,
    guide: GuideOpt = None,
    source: FromOpt = None,
    branch: NewBranchOpt = None,
    steps: StepsOpt = None,
    until: UntilOpt = None,
    autonpo: AutoOpt = False,
    fresh: FreshOpt = False,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Go on, or roll back and replay with a guide.

    Without --at, training goes on from the newest state. With --at and --guide it rolls back to that step and
    replays from there as a new branch; nothing that existed is overwritten.
    With --autonpo the run is watched from its first step on, looking back over what is on record; with --at as
    well it is watched from that step, as a new branch (npo autonpo RUN --explain rehearses).
    Settings that would falsify what was already computed are refused; train.num_steps may be raised.
    """
    settled = load_run_recipe(run, overrides, branch=source, fork=at is not None)
    last = resolve_last_step(until, settled, after=at or 0, autonpo=autonpo)
    where = {"overrides": overrides or (), "at": at, "source_branch": source, "new_branch": branch}
    if fresh:
        validate_fresh_optimizer(run, at=at, autonpo=autonpo)
    from npo_cli.training.tracking import track_records

    if autonpo:
        validate_no_guide_options(run, guide=guide, steps=steps)
        from npo_cli.autonpo.run import resume_autonpo

        records = resume_autonpo(run, **where)
    else:
        from npo_cli.training.resume import resume_run

        records = resume_run(run, **where, guide=guide, steps=steps, until=until, fresh=fresh)
    print_records(track_records(run, settled, records), as_json=as_json, num_steps=last)


def validate_fresh_optimizer(run: Path, *, at: int | None, autonpo: bool) -> None:
    """An optimizer begins anew where a branch is left by hand."""
    if at is None or autonpo:
        raise NpoError(
            "--fresh-optimizer begins a branch by hand: it needs --at STEP, and does not go with --autonpo",
            f"npo resume {quote_path(run)} --at STEP --fresh-optimizer",
        )


def validate_no_guide_options(run: Path, *, guide: str | None, steps: int | None) -> None:
    """AutoNPO makes its guides itself."""
    if guide is not None or steps is not None:
        raise NpoError(
            "--autonpo makes its own guides: --guide and --steps do not go with it",
            f"npo resume {quote_path(run)} --autonpo",
        )
