"""A run in a few facts, and several runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from npo_cli.costs import CurvePoint
from npo_cli.report.cells import Table, format_count, format_interval, format_number
from npo_cli.report.curves import Curve, make_accuracy_plots
from npo_cli.report.page import Section, Subsection
from npo_cli.run_dir.index import select_best_evals
from npo_cli.run_dir.lineage import list_branches, ancestry, find_newest_branch
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.accounting import compute_run_costs
from npo_cli.stages.ledger import learning_curve


def summarize_run(run: RunDir, branch: str) -> tuple[tuple[str, str], ...]:
    """What a reader asks first."""
    recipe, birth, spent = run.read_recipe(branch), run.info, compute_run_costs(run, branch)
    names = list_branches(run)
    return (
        ("recipe", str(recipe.get("name", "-"))),
        ("model", str(_section(recipe, "model").get("path", "-"))),
        ("task", str(_section(recipe, "task").get("source", "-"))),
        ("seed", str(_section(recipe, "train").get("seed", "-"))),
        ("learning rate", str(_section(recipe, "train").get("lr", "-"))),
        (f"branch, newest of {len(names)}", branch),
        ("step", format_count(spent.step)),
        final_accuracy(run, branch),
        ("updates executed", format_count(spent.updates)),
        ("tokens generated", format_count(spent.tokens)),
        ("seconds", f"{spent.seconds:,.1f}"),
        ("started", birth.created),
        ("npo", birth.npo_version),
        ("run", birth.run_id[:12]),
    )


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = recipe.get(name)
    return found if isinstance(found, Mapping) else {}


def final_accuracy(run: RunDir, branch: str) -> tuple[str, str]:
    """Of the newest step evaluated on the line of descent: which one, and the accuracy with its interval."""
    line = ancestry(run, branch)
    seen = {
        step: report
        for (owner, step), report in select_best_evals(run).items()
        if any(stretch.branch == owner and stretch.contains(step) for stretch in line)
    }
    if not seen:
        return "held-out accuracy", "-"
    newest = seen[max(seen)]
    told = format_interval(newest.accuracy, newest.accuracy_low, newest.accuracy_high)
    return f"held-out accuracy, step {newest.step}", told


def build_overview(runs: Sequence[tuple[str, RunDir]]) -> Section:
    """The newest branch of every run, on the same axes and in one table."""
    rows, arms = [], []
    for place, (label, run) in enumerate(runs):
        branch = find_newest_branch(run)
        spent, points = compute_run_costs(run, branch), learning_curve(run, branch, name=_ascii(label))
        rows.append(
            (
                *(label, str(run.read_recipe(branch).get("name", "-")), branch, format_count(spent.step)),
                *(final_accuracy(run, branch)[1], format_number(_best(points)), format_count(spent.updates), format_count(spent.tokens)),
                f"{spent.seconds:,.1f}",
            )
        )
        if points:
            arms.append(Curve(index=place, points=tuple(points), guide_until=None, is_fork=False))
    header = ("run", "recipe", "branch", "step", "newest held-out accuracy", "best", "updates", "tokens", "seconds")
    part = Subsection(
        title="Side by side",
        text="The newest branch of each run. Updates, tokens and seconds are those of the whole run.",
        plots=tuple(make_accuracy_plots(arms, prefix="overview-")) if arms else (),
        tables=(Table(title="Runs", header=header, rows=tuple(rows)),),
    )
    return Section(title="Overview", summary=(), subsections=(part,))


def _best(points: Sequence[CurvePoint]) -> float | None:
    return max((point.accuracy for point in points), default=None)


def _ascii(label: str) -> str:
    """The letters that every font of a picture has."""
    return label.encode("ascii", "backslashreplace").decode()
