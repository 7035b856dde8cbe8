"""The section of one run in a report: results, training, lineage, decisions with their evidence, costs, rollouts.

And the overview of several runs.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from npo_cli.report.comparison_summary import Comparison, build_comparison, summarize_comparison
from npo_cli.report.curve_plots import Curve, make_accuracy_plots, make_training_plots
from npo_cli.report.html import Section, Subsection, SummaryLine
from npo_cli.report.hysteresis import replay_hysteresis
from npo_cli.report.lineage_plot import make_lineage_plot
from npo_cli.report.prompt_history import prompt_outcomes_table, read_outcomes, select_samples
from npo_cli.report.run_summary import (
    describe_best_checkpoint,
    describe_worth,
    find_best_accuracy,
    get_section,
    list_commands,
    list_recorded_commands,
    summarize_in_words,
)
from npo_cli.report.score_plots import make_probe_plots, make_score_plots
from npo_cli.report.show import show_costs, show_metrics
from npo_cli.report.table import Table, format_count, format_interval, format_number
from npo_cli.report.tables import evals_tables, guides_tables, lineage_tables, scores_tables
from npo_cli.report.tables_autonpo import probe_tables, rung_tables, transitions_tables
from npo_cli.report.tables_compare import hysteresis_tables
from npo_cli.report.tables_costs import cost_to_threshold_tables, costs_tables
from npo_cli.report.tables_scores import describe_choice
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.cost_sums import compute_run_costs, costs_by_activity, learning_curve
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.index import find_best_branch, select_best_evals, select_line_evals
from npo_cli.storage.layout import RunDir, dump_recipe
from npo_cli.storage.lineage import ancestry, find_first_segment, list_branches, list_result_branches, read_segments
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.sample_store import read_all_scores
from npo_cli.types.costs import CostToThreshold, CurvePoint
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.scores import NO_GUIDE, CandidateScore
from npo_cli.types.views import BranchSpan


def summarize_run(run: RunDir, branch: str) -> tuple[tuple[str, str], ...]:
    """Names and values at the top of the section."""
    recipe, info, spent = run.read_recipe(branch), run.info, compute_run_costs(run, branch)
    names = list_result_branches(run)
    return (
        ("recipe", str(recipe.get("name", "-"))),
        ("model", str(get_section(recipe, "model").get("path", "-"))),
        ("task", str(get_section(recipe, "task").get("source", "-"))),
        ("seed", str(get_section(recipe, "train").get("seed", "-"))),
        ("learning rate", str(get_section(recipe, "train").get("lr", "-"))),
        (f"branch, {'best ' * (branch == find_best_branch(run))}of {len(names)}", branch),
        ("step", format_count(spent.step)),
        final_accuracy(run, branch),
        ("updates executed", format_count(spent.updates)),
        ("tokens generated", format_count(spent.tokens)),
        ("seconds", f"{spent.seconds:,.1f}"),
        ("started", f"{info.created[:10]} {info.created[11:16]} UTC"),
        ("npo", info.npo_version),
        ("run", info.run_id[:12]),
    )


def final_accuracy(run: RunDir, branch: str) -> tuple[str, str]:
    """The newest evaluated step of the lineage and its accuracy with interval."""
    seen = select_line_evals(run, branch)
    if not seen:
        return "held-out accuracy", "-"
    newest = seen[max(seen)]
    accuracy = format_interval(newest.accuracy, newest.accuracy_low, newest.accuracy_high)
    return f"held-out accuracy, step {newest.step}", accuracy


def build_overview(runs: Sequence[tuple[str, RunDir]], comparison: Comparison | None = None) -> Section:
    """The best branch of every run, on the same axes and in one table; of a bench first its methods compared."""
    rows, curves = [], []
    for index, (label, run) in enumerate(runs):
        branch = find_best_branch(run)
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
            curves.append(Curve(index=index, points=tuple(points), guide_until=None, is_fork=False))
    header = ("run", "recipe", "branch", "step", "newest held-out accuracy", "best", "updates", "tokens", "seconds")
    hysteresis = replay_hysteresis([run for _, run in runs])
    part = Subsection(
        title="Side by side",
        text="The best branch of each run by held-out accuracy. Updates, tokens and seconds: of the whole run.",
        plots=tuple(make_accuracy_plots(curves, prefix="overview-")) if curves else (),
        tables=(
            Table(title="Runs", header=header, rows=tuple(rows)),
            *(hysteresis_tables(hysteresis) if hysteresis else ()),
        ),
    )
    compared = () if comparison is None else (build_comparison(comparison),)
    return Section(
        title="Overview",
        words=tuple(_summarize_runs(runs, comparison)),
        commands=tuple(list_recorded_commands([run for _, run in runs])),
        summary=(),
        subsections=(*compared, part),
    )


def _summarize_runs(runs: Sequence[tuple[str, RunDir]], comparison: Comparison | None) -> Iterator[SummaryLine]:
    """What was trained in all, and the best checkpoint of all; then the methods, or each run."""
    costs = [compute_run_costs(run, find_best_branch(run)) for _, run in runs]
    updates, tokens = sum(one.updates for one in costs), sum(one.tokens for one in costs)
    seconds = sum(one.seconds for one in costs)
    spent = f"{updates:,} updates, {tokens:,} generated tokens and {seconds:,.0f} s in all."
    yield SummaryLine(label="Trained", text=f"{len(runs)} runs; {spent}")
    label, best = max(runs, key=lambda pair: find_best_accuracy(pair[1]))
    yield SummaryLine(label="Best checkpoint", text=f"{label}: {describe_best_checkpoint(best)}")
    if comparison is not None:
        yield from summarize_comparison(comparison)
        return
    for name, run in runs:
        branch = find_best_branch(run)
        what, accuracy = final_accuracy(run, branch)
        reached = f"{what} of {branch}: {accuracy}. Worth it? {describe_worth(run, branch)}"
        yield SummaryLine(label=name, text="not evaluated." if accuracy == "-" else reached)


def _best(points: Sequence[CurvePoint]) -> float | None:
    return max((point.accuracy for point in points), default=None)


def _ascii(label: str) -> str:
    """Only characters that every font has."""
    return label.encode("ascii", "backslashreplace").decode()


MAX_PLOTTED_PROBES = 6
"""Probes that are plotted; all are in tables."""


def build_run_section(run: RunDir, *, title: str, prefix: str, branch: str | None = None) -> Section:
    """Everything of one run; `prefix` starts the names of its plots."""
    branch = branch or find_best_branch(run)
    spans = collect_branch_spans(run, branch)
    parts = (
        *_accuracy(run, prefix=prefix),
        *_training(run, spans, prefix=prefix),
        _lineage(run, spans, prefix=prefix),
        *_decisions(run, prefix=prefix),
        *_scores(run, prefix=prefix),
        _cost(run, branch),
        *_rollouts(run, branch),
        Subsection(title="Recipe", listing=dump_recipe(run.read_recipe(branch))),
    )
    return Section(
        title=title,
        words=tuple(summarize_in_words(run, branch)),
        commands=tuple(list_commands(run)),
        summary=summarize_run(run, branch),
        subsections=parts,
    )


def collect_branch_spans(run: RunDir, branch: str) -> list[BranchSpan]:
    """Every branch, and which part of it is in the lineage of `branch`."""
    kept = {span.branch: span for span in ancestry(run, branch)}
    caches = {info.name: info for info in list_guide_caches(run)}
    found = []
    for name in list_branches(run):
        first = find_first_segment(run, name)
        last = max((row["step"] for row in read_metrics(run, name)), default=first.fork_step)
        ends = last if name in kept and kept[name].to_step is None else kept[name].to_step if name in kept else None
        found.append(
            BranchSpan(
                branch=name,
                parent=first.parent,
                fork_step=first.fork_step,
                last_step=last,
                lineage_until=ends,
                guide_cache=first.guide_cache,
                guide_step=get_guide_step(caches.get(first.guide_cache or "")),
                guide_until=first.guide_until,
            )
        )
    return found


def get_guide_step(info: GuideCacheInfo | None) -> int | None:
    """Step of the guide in this run; None for guides from elsewhere."""
    return None if info is None else info.guide_step


def build_curves(run: RunDir) -> Iterator[Curve]:
    """One curve per branch, from its fork on; none for a branch without an evaluation, and for a scout."""
    for index, name in enumerate(list_branches(run)):
        first = find_first_segment(run, name)
        if first.is_scout:
            continue
        points = learning_curve(run, name, name=name)
        if first.parent is not None:
            # Two points at the fork: with the cost of the parent, and with guide and scoring paid.
            ready = [point for point in points if point.step == first.fork_step][-1:]
            points = [*ready, *(point for point in points if point.step > first.fork_step)]
        if points:
            until = first.guide_until
            forks = first.parent is not None and points[0].step == first.fork_step
            yield Curve(index=index, points=tuple(points), guide_until=until, is_fork=forks)


def _accuracy(run: RunDir, *, prefix: str) -> Iterator[Subsection]:
    plotted = list(build_curves(run))
    if not plotted:
        yield Subsection(title="Held-out accuracy", text="No checkpoint has been evaluated: run npo eval RUN --all.")
        return
    costs = [one for one in show_costs(run, branch=None) if isinstance(one, CostToThreshold)]
    hysteresis = replay_hysteresis([run])
    yield Subsection(
        title="Held-out accuracy",
        text="By logical step, and by total cost: steps, tokens and seconds, with the training of guides, scoring, "
        "probes and guide samples. A diamond is a rollback; the wide band behind a line marks the steps with a guide.",
        plots=tuple(make_accuracy_plots(plotted, prefix=prefix)),
        tables=(
            *(cost_to_threshold_tables(costs) if costs else ()),
            *(hysteresis_tables(hysteresis) if hysteresis else ()),
        ),
        collapsed_tables=evals_tables([report for _, report in sorted(select_best_evals(run).items())]),
    )


def _training(run: RunDir, spans: Sequence[BranchSpan], *, prefix: str) -> Iterator[Subsection]:
    reports = list(show_metrics(run, branch=None, step=None))
    if reports:
        yield Subsection(
            title="Training",
            text="Thin lines: steps; thick lines: moving average of nine. Dotted vertical line: rollback; shaded: "
            "steps with a guide.",
            plots=tuple(make_training_plots(reports, spans, prefix=prefix)),
        )


def _lineage(run: RunDir, spans: Sequence[BranchSpan], *, prefix: str) -> Subsection:
    guides = list_guide_caches(run)
    return Subsection(
        title="Lineage",
        text="One lane per branch. Dotted: rolled back. An arrow leads from the checkpoint of the guide (or from the "
        "parent) to the step that training was resumed from.",
        plots=(make_lineage_plot(spans, read_transitions(run), prefix=prefix),),
        tables=(*lineage_tables(read_segments(run)), *(guides_tables(guides) if guides else ())),
    )


def _decisions(run: RunDir, *, prefix: str) -> Iterator[Subsection]:
    moves = read_transitions(run)
    if not moves:
        return
    yield Subsection(title="AutoNPO", tables=(*transitions_tables(moves)[:1], *rung_tables(moves)))
    for number, move in enumerate(move for move in moves if move.evidence.get("scores")):
        found, name = move.evidence, f"{prefix}probe-{move.step}-{move.event}-"
        yield Subsection(
            title=f"Probe at step {move.step}: {move.event.replace('_', ' ')}",
            text=str(found.get("reason") or "")
            or "Q_net, V and S = Q_net / V of each rollback distance, 95 % intervals.",
            plots=tuple(make_probe_plots(found["scores"], prefix=name)) if number < MAX_PLOTTED_PROBES else (),
            collapsed_tables=probe_tables(found, where=f"step {move.step}"),
        )


def _scores(run: RunDir, *, prefix: str) -> Iterator[Subsection]:
    for result in read_all_scores(run):
        if result.scores:
            signals, *others = scores_tables(result.scores)
            yield Subsection(
                title=f"Candidate guides for step {result.learner_step} of {result.branch}",
                text=_selection(result.scores),
                plots=tuple(make_score_plots(result.scores, prefix=f"{prefix}{result.folder.name}-")),
                tables=(signals,),
                collapsed_tables=tuple(others),
            )


def _selection(scores: Sequence[CandidateScore]) -> str:
    return (
        "Q: how often it solves prompts that the learner fails. Q_net: beyond the learner's own second try. V: "
        f"variance cost of its distance. S = Q_net / V{_division(scores)}. {describe_choice(scores)}"
    )


def _division(scores: Sequence[CandidateScore]) -> str:
    """The selected candidate's S as the quotient that it is: `, for checkpoint:80 0.486 / 1.361 = 0.357`."""
    one = next((score for score in scores if score.is_selected and score.candidate != NO_GUIDE and score.signal), None)
    if one is None:
        return ""
    return f", for {one.candidate} {one.quality_net:.3f} / {format_number(one.variance)} = {format_number(one.signal)}"


def _cost(run: RunDir, branch: str) -> Subsection:
    return Subsection(
        title="Costs",
        text="Everything that the run executed, rolled-back and rejected work included.",
        tables=costs_tables(list(costs_by_activity(run, branch))),
    )


def _rollouts(run: RunDir, branch: str) -> Iterator[Subsection]:
    marks = read_outcomes(run, branch)
    if marks:
        has_guides = any(one.has_guide for one in chain(*marks.values()))
        which = "with an injected guide" if has_guides else "of the newest step"
        yield Subsection(
            title="Prompts and responses",
            text=f"Some of the prompts {which}, evenly spaced. Log-probabilities are those of the behavior "
            "policy. The row below each prompt is its whole history.",
            tables=(prompt_outcomes_table(branch, marks),),
            samples=tuple(select_samples(run, branch, marks)),
        )
