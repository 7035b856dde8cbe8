"""`npo resume`."""

from typing import Annotated

import typer

from npo_cli.cli.console import draw
from npo_cli.cli.early import recipe_of
from npo_cli.cli.options import AllowCodeOpt, JsonOpt, OverridesArg, RunArg


def resume(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: Annotated[int | None, typer.Option("--at", min=0, metavar="STEP", help="Roll back to this step.")] = None,
    guide: Annotated[
        str | None,
        typer.Option("--guide", metavar="NAME", help="Guide cache to mix into the replay (npo sample-guide)."),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="BRANCH", help="Branch to go on with or to leave. [default: newest]")
    ] = None,
    branch: Annotated[str | None, typer.Option("--branch", metavar="NEWNAME", help="Name of the new branch.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Steps for which the guide is mixed in.")
    ] = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Go on, or roll back and replay with a guide.

    Without --at, training goes on from the newest state. With --at and --guide it rolls back to that step and
    replays from there as a new branch; nothing that existed is overwritten.
    Settings that would falsify what was already computed are refused; train.num_steps may be raised.
    """
    settled = recipe_of(run, overrides, branch=source, fork=at is not None)

    from npo_cli.stages.resume import resume_run

    records = resume_run(
        run,
        overrides=overrides or (),
        at=at,
        guide=guide,
        source_branch=source,
        new_branch=branch,
        steps=steps,
        allow_code=allow_code,
    )
    draw(records, as_json=as_json, num_steps=settled.train.num_steps)
