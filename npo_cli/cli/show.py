"""`npo show`."""

from typing import Annotated, Literal

import typer

from npo_cli.cli.options import JsonOpt, RunArg
from npo_cli.cli.output import print_records
from npo_cli.cli.terminal import escape_for_terminal, print_status

ShowTopic = Literal["metrics", "rollouts", "guides", "lineage", "groups", "costs"]


def show(
    run: RunArg,
    what: Annotated[
        ShowTopic, typer.Argument(metavar="WHAT", help="metrics, rollouts, guides, lineage, groups or costs.")
    ] = "metrics",
    *,
    branch: Annotated[
        str | None, typer.Option("--branch", metavar="NAME", help="Only this branch. [default: what there is]")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", min=0, metavar="N", help="Only this step.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="ID", help="Only this prompt.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="The last N lines.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Look inside a run.

    rollouts and groups are those of the newest step, unless --step or --prompt says otherwise. `rollouts --prompt ID`
    follows one prompt through training, across the branches that this one descends from.
    """
    from npo_cli.report.show import show_run

    lines = show_run(run, what, branch=branch, step=step, prompt_id=prompt, limit=limit)
    if not lines:
        print_status(escape_for_terminal(f"{run} has no {what} yet"))
    print_records(lines, as_json=as_json)
