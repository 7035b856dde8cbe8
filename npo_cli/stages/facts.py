"""A run in a few facts, and several runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from npo_cli.costs import CurvePoint
from npo_cli.report.cells import Table, count, interval, number
from npo_cli.report.curves import Arm, accuracy_pictures
from npo_cli.report.page import Chapter, Part
from npo_cli.run_dir.index import best_evals
from npo_cli.run_dir.lineage import branches, descent, newest_branch
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.accounting import account
from npo_cli.stages.ledger import curve


def facts_of(run: RunDir, branch: str) -> tuple[tuple[str, str], ...]:
    """What a reader asks first."""
    recipe, birth, spent = run.recipe(branch), run.birth, account(run, branch)
    names = branches(run)
    return (
        ("recipe", str(recipe.get("name", "-"))),
        ("model", str(_section(recipe, "model").get("path", "-"))),
        ("task", str(_section(recipe, "task").get("source", "-"))),
        ("seed", str(_section(recipe, "train").get("seed", "-"))),
        ("learning rate", str(_section(recipe, "train").get("lr", "-"))),
        (f"branch, newest of {len(names)}", branch),
        ("step", count(spent.step)),
        final_accuracy(run, branch),
        ("updates executed", count(spent.updates)),
        ("tokens generated", count(spent.tokens)),
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
    line = descent(run, branch)
    seen = {
        step: report
        for (owner, step), report in best_evals(run).items()
        if any(stretch.branch == owner and stretch.owns(step) for stretch in line)
    }
    if not seen:
        return "held-out accuracy", "-"
    newest = seen[max(seen)]
    told = interval(newest.accuracy, newest.accuracy_low, newest.accuracy_high)
    return f"held-out accuracy, step {newest.step}", told


def overview(runs: Sequence[tuple[str, RunDir]]) -> Chapter:
    """The newest branch of every run, on the same axes and in one table."""
    rows, arms = [], []
    for place, (label, run) in enumerate(runs):
        branch = newest_branch(run)
        spent, points = account(run, branch), curve(run, branch, arm=_ascii(label))
        rows.append(
            (
                *(label, str(run.recipe(branch).get("name", "-")), branch, count(spent.step)),
                *(final_accuracy(run, branch)[1], number(_best(points)), count(spent.updates), count(spent.tokens)),
                f"{spent.seconds:,.1f}",
            )
        )
        if points:
            arms.append(Arm(place=place, points=tuple(points), guide_until=None, is_fork=False))
    header = ("run", "recipe", "branch", "step", "newest held-out accuracy", "best", "updates", "tokens", "seconds")
    part = Part(
        title="Side by side",
        text="The newest branch of each run. Updates, tokens and seconds are those of the whole run.",
        pictures=tuple(accuracy_pictures(arms, prefix="overview-")) if arms else (),
        tables=(Table(title="Runs", header=header, rows=tuple(rows)),),
    )
    return Chapter(title="Overview", facts=(), parts=(part,))


def _best(points: Sequence[CurvePoint]) -> float | None:
    return max((point.accuracy for point in points), default=None)


def _ascii(label: str) -> str:
    """The letters that every font of a picture has."""
    return label.encode("ascii", "backslashreplace").decode()
