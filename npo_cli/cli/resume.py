"""`npo resume`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npo_cli.cli.checks import load_run_recipe, resolve_last_step
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, OverridesArg, RunArg, UntilOpt
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path

if TYPE_CHECKING:
    from npo_cli.config.recipe import Recipe

ForkAtOpt = Annotated[int | None, typer.Option("--at", min=0, metavar="STEP", help="Fork a new branch at this step.")]
GuideOpt = Annotated[
    str | None,
    typer.Option("--guide", metavar="NAME", help="Inject responses of this guide cache (npo sample-guide)."),
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
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Resume training, or fork from an earlier step.

    Without --at, training continues from the newest training state of the branch. With --at, a new branch is forked at
    that step and trained with the guide of --guide, or with --no-guide without one; existing files are never
    overwritten.
    With --autonpo, AutoNPO reads the recorded steps, then controls the training; with --at it starts at that step, on a
    new branch (npo autonpo RUN --explain is a dry run).
    Settings that earlier steps depend on cannot change; train.num_steps may be raised.
    """
    hint = "" if branch is None or at is None else f"--new-branch {quote_path(Path(branch))}   # names a new branch"
    purpose = "resume" if at is None else "fork"
    recipe = load_run_recipe(run, overrides, branch=branch, purpose=purpose, hint=hint)
    last = resolve_last_step(until, recipe, after=at or 0, autonpo=autonpo)
    _check_combination(run, at=at, autonpo=autonpo, fresh=fresh, has_guide=guide is not None or steps is not None)
    if no_guide or (at is not None and guide is None and not autonpo):
        _check_guide_choice(run, recipe, at=at, guide=guide, no_guide=no_guide, autonpo=autonpo)
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
            f"npo resume {quote_path(run)} --at STEP --no-guide --fresh-optimizer",
        )
    if autonpo and has_guide:
        raise NpoError(
            "--guide and --steps are not available with --autonpo, which builds its own guide caches",
            f"npo resume {quote_path(run)} --autonpo",
        )


def _check_guide_choice(
    run: Path, recipe: "Recipe", *, at: int | None, guide: str | None, no_guide: bool, autonpo: bool
) -> None:
    """A fork says whether it has a guide: a forgotten --guide would train a whole branch without one."""
    samples_online = recipe.guide.source != "cache"
    if not no_guide:
        if not samples_online:
            again = f"npo resume {quote_path(run)} --at {at}"
            raise NpoError(
                f"--at {at} forks a new branch: say whether it has a guide. --guide NAME injects the responses of a "
                "guide cache; --no-guide trains on without one",
                f"{again} --guide NAME, or {again} --no-guide",
            )
        return
    other = "--at STEP is missing" if at is None else "--guide is given" if guide else "--autonpo is given"
    if at is None or guide is not None or autonpo:
        raise NpoError(
            f"--no-guide forks a branch without a guide cache, but {other}",
            f"npo resume {quote_path(run)} --at STEP --no-guide",
        )
    if samples_online:
        raise NpoError(
            f"--no-guide, but guide.source={recipe.guide.source} samples a guide during training",
            f"npo resume {quote_path(run)} --at {at} --no-guide guide.source=cache",
        )
