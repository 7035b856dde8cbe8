"""One run as a chapter of a report: what it reached, how, what was decided and on what evidence, and at what cost.

A run in a few facts, and several runs side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from npo_cli.report.curve_plots import Curve, make_accuracy_plots, make_training_plots
from npo_cli.report.html import Section, Subsection
from npo_cli.report.lineage_plot import make_lineage_plot
from npo_cli.report.prompt_history import prompt_outcomes_table, select_samples, summarize_visits
from npo_cli.report.score_plots import make_probe_plots, make_score_plots
from npo_cli.report.show import THRESHOLDS, show_metrics
from npo_cli.report.table import Table, format_count, format_interval, format_number
from npo_cli.report.tables import evals_tables, guides_tables, lineage_tables, scores_tables
from npo_cli.report.tables_autonpo import probe_tables, transitions_tables
from npo_cli.report.tables_costs import cost_to_threshold_tables, costs_tables
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.cost_sums import compute_run_costs, cost_to_threshold, costs_by_activity, learning_curve
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.index import select_best_evals
from npo_cli.storage.layout import RunDir, dump_recipe
from npo_cli.storage.lineage import ancestry, find_first_segment, find_newest_branch, list_branches, read_segments
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.sample_store import read_all_scores
from npo_cli.types.costs import CurvePoint
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import CheckpointScore
from npo_cli.types.views import BranchSpan


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
                *(
                    final_accuracy(run, branch)[1],
                    format_number(_best(points)),
                    format_count(spent.updates),
                    format_count(spent.tokens),
                ),
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


MAX_PLOTTED_PROBES = 6
"""Probes that are drawn; all are tabulated."""


def build_run_section(run: RunDir, *, title: str, prefix: str, branch: str | None = None) -> Section:
    """Everything of one run; `prefix` begins the names of its pictures."""
    branch = branch or find_newest_branch(run)
    limbs = collect_branch_spans(run, branch)
    parts = (
        *_reached(run, prefix=prefix),
        *_trained(run, limbs, prefix=prefix),
        _lineage(run, limbs, prefix=prefix),
        *_decided(run, prefix=prefix),
        *_scored(run, prefix=prefix),
        _cost(run, branch),
        *_answered(run, branch),
        Subsection(title="Recipe", listing=dump_recipe(run.read_recipe(branch))),
    )
    return Section(title=title, summary=summarize_run(run, branch), subsections=parts)


def collect_branch_spans(run: RunDir, branch: str) -> list[BranchSpan]:
    """Every branch, as the line of descent of one of them sees it."""
    kept = {stretch.branch: stretch for stretch in ancestry(run, branch)}
    caches = {info.name: info for info in list_guide_caches(run)}
    found = []
    for name in list_branches(run):
        born = find_first_segment(run, name)
        last = max((row["step"] for row in read_metrics(run, name)), default=born.fork_step)
        ends = last if name in kept and kept[name].to_step is None else kept[name].to_step if name in kept else None
        found.append(
            BranchSpan(
                branch=name,
                parent=born.parent,
                fork_step=born.fork_step,
                last_step=last,
                lineage_until=ends,
                guide_cache=born.guide_cache,
                guide_step=get_guide_step(caches.get(born.guide_cache or "")),
                guide_until=born.guide_until,
            )
        )
    return found


def get_guide_step(info: GuideCacheInfo | None) -> int | None:
    """Where on this run's own line the guide stands; None for others' guides."""
    return info.guide_step if info is not None and info.source != "run" else None


def build_curves(run: RunDir) -> Iterator[Curve]:
    """A curve a branch, from its rollback on; a branch without an evaluation has none."""
    for place, name in enumerate(list_branches(run)):
        born = find_first_segment(run, name)
        points = learning_curve(run, name, name=name)
        if born.parent is not None:
            # Two points stand at the fork: the parent's cost, and the cost of being ready to start again.
            ready = [point for point in points if point.step == born.fork_step][-1:]
            points = [*ready, *(point for point in points if point.step > born.fork_step)]
        if points:
            until = born.guide_until
            forks = born.parent is not None and points[0].step == born.fork_step
            yield Curve(index=place, points=tuple(points), guide_until=until, is_fork=forks)


def _reached(run: RunDir, *, prefix: str) -> Iterator[Subsection]:
    arms = list(build_curves(run))
    if not arms:
        yield Subsection(title="Held-out accuracy", text="No checkpoint was evaluated yet: npo eval RUN --all does it.")
        return
    curves = [learning_curve(run, name, name=name) for name in list_branches(run)]
    crossings = [cost_to_threshold(points, threshold) for threshold in THRESHOLDS for points in curves if points]
    yield Subsection(
        title="Held-out accuracy",
        text="By place in the data, and by everything it had cost by then: all steps, tokens and seconds, those of "
        "scouts, scorings, probes and guides included. A diamond is a rollback; the broad band behind a line "
        "lasts as long as a guide was mixed in.",
        plots=tuple(make_accuracy_plots(arms, prefix=prefix)),
        tables=cost_to_threshold_tables(crossings),
        collapsed_tables=evals_tables([report for _, report in sorted(select_best_evals(run).items())]),
    )


def _trained(run: RunDir, limbs: Sequence[BranchSpan], *, prefix: str) -> Iterator[Subsection]:
    reports = list(show_metrics(run, branch=None, step=None))
    if reports:
        yield Subsection(
            title="Training",
            text="Thin lines are single steps, thick ones a moving average of nine. A dotted vertical line is a "
            "rollback, a shaded range the steps in which a guide was mixed in.",
            plots=tuple(make_training_plots(reports, limbs, prefix=prefix)),
        )


def _lineage(run: RunDir, limbs: Sequence[BranchSpan], *, prefix: str) -> Subsection:
    guides = list_guide_caches(run)
    return Subsection(
        title="Lineage",
        text="A lane a branch. What a dotted line shows was left behind; an arrow leads from the checkpoint that "
        "was the guide (or from the parent) back to the step from which training began again.",
        plots=(make_lineage_plot(limbs, read_transitions(run), prefix=prefix),),
        tables=(*lineage_tables(read_segments(run)), *(guides_tables(guides) if guides else ())),
    )


def _decided(run: RunDir, *, prefix: str) -> Iterator[Subsection]:
    moves = read_transitions(run)
    if not moves:
        return
    yield Subsection(title="AutoNPO", tables=transitions_tables(moves)[:1])
    for number, move in enumerate(move for move in moves if move.evidence.get("scores")):
        found, name = move.evidence, f"{prefix}probe-{move.step}-{move.event}-"
        yield Subsection(
            title=f"Probe at step {move.step}: {move.event}",
            text=str(found.get("reason") or "") or "Q, V and S of each rollback distance, 95 % intervals.",
            plots=tuple(make_probe_plots(found["scores"], prefix=name)) if number < MAX_PLOTTED_PROBES else (),
            collapsed_tables=probe_tables(found, where=f"step {move.step}"),
        )


def _scored(run: RunDir, *, prefix: str) -> Iterator[Subsection]:
    for answer in read_all_scores(run):
        if answer.scores:
            signals, kinds = scores_tables(answer.scores)
            yield Subsection(
                title=f"Candidate guides for step {answer.learner_step} of {answer.branch}",
                text=_choice(answer.scores),
                plots=tuple(make_score_plots(answer.scores, prefix=f"{prefix}{answer.folder.name}-")),
                tables=(signals,),
                collapsed_tables=(kinds,),
            )


def _choice(scores: Sequence[CheckpointScore]) -> str:
    best = next((one for one in scores if one.is_selected), None)
    rule = "Q: how much of what the learner fails it solves. V: what its distance costs in variance. S = Q / V."
    return rule if best is None else f"{rule} Step {best.step} has the largest S in {best.p_best:.0%} of the resamples."


def _cost(run: RunDir, branch: str) -> Subsection:
    return Subsection(
        title="What it cost",
        text="Nothing that was executed is left out, whatever became of it.",
        tables=costs_tables(list(costs_by_activity(run, branch))),
    )


def _answered(run: RunDir, branch: str) -> Iterator[Subsection]:
    marks = summarize_visits(run, branch)
    if marks:
        seated = any(one.has_guide for one in chain(*marks.values()))
        which = "for which a guide was seated" if seated else "of the newest step"
        yield Subsection(
            title="Prompts and answers",
            text=f"Some of the prompts {which}, evenly spaced. Log-probabilities are those of the policy that wrote "
            "the answer, the guide's under the guide. The row below each prompt is its whole history.",
            tables=(prompt_outcomes_table(branch, marks),),
            samples=tuple(select_samples(run, branch, marks)),
        )
