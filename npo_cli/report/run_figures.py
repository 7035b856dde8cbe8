"""Pictures of one run in one file: what `--figure FILE` saves of `npo show`, `npo eval` and `npo report`."""

from collections.abc import Sequence
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.report.curve_plots import Curve, make_accuracy_plots, make_training_plots
from npo_cli.report.lineage_plot import make_lineage_plot
from npo_cli.report.plotting import Plot, save_panels
from npo_cli.report.run_page import build_curves, collect_branch_spans
from npo_cli.report.show import show_metrics
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.cost_sums import learning_curve
from npo_cli.storage.index import find_best_branch
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_first_segment

DRAWN_TOPICS = ("metrics", "lineage", "costs")
"""Topics of `npo show` that have a picture."""


def plot_topic(root: Path, topic: str, figure: Path, *, branch: str | None = None) -> None:
    """Metrics by step, the lineage, or held-out accuracy by each kind of cost; of one branch, or of all."""
    run = open_run(root)
    if branch is not None:
        find_first_segment(run, branch)
    match topic:
        case "costs":
            plot_accuracy([run], figure, branch=branch)
            return
        case "metrics":
            reports = list(show_metrics(run, branch=branch, step=None))
            spans = collect_branch_spans(run, branch or find_best_branch(run))
            plots: Sequence[Plot] = list(make_training_plots(reports, spans, prefix=""))
        case _:
            spans = collect_branch_spans(run, branch or find_best_branch(run))
            plots = [make_lineage_plot(spans, read_transitions(run), prefix="")]
    if not plots:
        raise NpoError(f"{root} has no {topic} to draw yet", f"npo show {quote_path(root)} {topic}")
    save_panels(plots, figure, title=root.name)


def check_topic(root: Path, topic: str) -> None:
    """Refuse a picture of a topic that has none."""
    if topic not in DRAWN_TOPICS:
        raise NpoError(
            f"--figure does not apply to {topic}, only to {', '.join(DRAWN_TOPICS)}",
            f"npo show {quote_path(root)} costs --figure FILE",
        )


def plot_accuracy(runs: Sequence[RunDir], figure: Path, *, branch: str | None = None) -> None:
    """Held-out accuracy by step and by each kind of cost: every branch of one run, or the best branch of each run."""
    if len(runs) == 1:
        run = runs[0]
        curves = [one for one in build_curves(run) if branch in (None, one.points[0].name)]
    else:
        named = [(index, run, find_best_branch(run)) for index, run in enumerate(runs)]
        found = [
            (index, learning_curve(run, best, name=str(run.root).replace("$", r"\$"))) for index, run, best in named
        ]
        curves = [
            Curve(index=index, points=tuple(points), guide_until=None, is_fork=False)
            for index, points in found
            if points
        ]
    if not curves:
        raise NpoError("no checkpoint has been evaluated", f"npo eval {quote_path(runs[0].root)} --all")
    save_panels(list(make_accuracy_plots(curves, prefix="")), figure, title="")
