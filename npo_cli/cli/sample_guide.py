"""`npo sample-guide`."""

from typing import Annotated

import typer

from npo_cli.cli.console import draw
from npo_cli.cli.early import recipe_of
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, OverridesArg, RunArg


def sample_guide(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    guide: Annotated[
        int | None,
        typer.Option("--guide", min=1, metavar="STEP", help="Step of the guide. [default: intervention.guide]"),
    ] = None,
    at: Annotated[
        int | None, typer.Option("--at", min=0, metavar="STEP", help="Step of the learner. [default: intervention.at]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Length of the replay. [default: guide minus at]")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the guide cache.")] = None,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Keep a later checkpoint's correct answers.

    It is asked the prompts that a replay from --at will visit; one verified-correct answer a prompt is kept.
    """
    recipe_of(run, overrides, branch=branch)

    from npo_cli.stages.sample_guide import sample_run

    records = sample_run(
        run,
        guide_step=guide,
        at=at,
        name=name,
        branch=branch,
        steps=steps,
        overrides=overrides or (),
        allow_code=allow_code,
    )
    draw(records, as_json=as_json)
