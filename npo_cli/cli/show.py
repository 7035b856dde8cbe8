"""`npo show`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from npo_cli.cli.options import FullOpt, JsonOpt, OnlyBranchOpt, RunArg, make_figure_option, make_results_option
from npo_cli.cli.output import print_records
from npo_cli.cli.terminal import escape_for_terminal, print_notice
from npo_cli.types.costs import CostToThreshold
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Segment, StepReport
from npo_cli.types.views import GroupView, PromptVisit, RolloutView

ShowTopic = Literal["metrics", "rollouts", "guides", "lineage", "groups", "costs"]
SAVED_KINDS = {
    "metrics": StepReport,
    "rollouts": RolloutView,
    "groups": GroupView,
    "guides": GuideCacheInfo,
    "lineage": Segment,
    "costs": CostToThreshold,
}
"""The records of each topic that `--out FILE.csv` holds."""


def show(
    run: RunArg,
    what: Annotated[
        ShowTopic, typer.Argument(metavar="WHAT", help="metrics, rollouts, guides, lineage, groups or costs.")
    ] = "metrics",
    *,
    branch: OnlyBranchOpt = None,
    step: Annotated[int | None, typer.Option("--step", min=0, metavar="N", help="Only this step.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="ID", help="Only this prompt.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the last N rows.")] = None,
    out: Annotated[Path | None, make_results_option("what is shown")] = None,
    figure: Annotated[Path | None, make_figure_option("a plot of metrics, lineage or costs")] = None,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Print metrics, rollouts, guides, lineage or costs.

    rollouts and groups show the newest step, unless --step or --prompt is given. `rollouts --prompt ID` shows one
    prompt's groups at every step, on the branch and its ancestors.
    """
    from npo_cli.report.show import show_run

    if figure is not None:
        from npo_cli.report.run_figures import check_topic, plot_topic

        check_topic(run, what)
    records = show_run(run, what, branch=branch, step=step, prompt_id=prompt, limit=limit)
    if not records:
        print_notice(escape_for_terminal(f"{run} has no {what} yet"))
    from npo_cli.report.conclusions import conclude_show

    conclude = partial(conclude_show, run, what) if records else None
    kind = SAVED_KINDS[what] if prompt is None or step is not None or what != "rollouts" else PromptVisit
    print_records(records, as_json=as_json, full=full, conclude=conclude, out=out, saved_as=kind)
    if figure is not None:
        plot_topic(run, what, figure, branch=branch)
        print_notice(escape_for_terminal(f"picture: {figure}"))
