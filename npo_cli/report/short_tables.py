"""The tables that commands print unless `--full` is given: at most 80 columns wide, with the rows that decide.

Every kind of record that has no table here is printed as in `tables.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from npo_cli.report.prompt_tables import describe_source
from npo_cli.report.table import (
    Column,
    Table,
    bool_column,
    build_table,
    count_column,
    drop_empty_columns,
    format_bytes,
    format_count,
    format_number,
    number_column,
    text_column,
)
from npo_cli.report.tables import TABLES, metric_column, summarize_branches
from npo_cli.report.tables_autonpo import REASON_MEANINGS, describe_evidence, rung_tables
from npo_cli.report.tables_compare import SEEDS, describe_final, format_cost
from npo_cli.report.tables_costs import compare_costs
from npo_cli.report.tables_memory import short_allocations_tables
from npo_cli.report.tables_scores import name_variance, sort_candidates
from npo_cli.types.autonpo import NonTriggerSpan, ProbeResult, Transition
from npo_cli.types.calibration import CandidateGain, RuleResult
from npo_cli.types.comparison import (
    Estimate,
    MethodDifference,
    MethodHysteresis,
    MethodSummary,
    MethodTimeToThreshold,
    SpeedUp,
)
from npo_cli.types.costs import CostToThreshold, RunCosts
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.memory import Allocation
from npo_cli.types.rollouts import CheckpointEntry, EvalReport, Segment, StepReport
from npo_cli.types.scores import CandidateScore
from npo_cli.types.views import GroupView, PromptHistory, PromptVisit, RolloutView, RunListing

MAX_ROWS = 16
NUM_NEWEST = 5
"""Rows of a table that has one per step, prompt or response."""
NAME_CHARS = 18
"""Characters of a branch, guide or candidate."""
METHOD_CHARS, CURVE_CHARS = 28, 22
"""Characters of a method; in tables of curves, which have more columns."""
TEXT_CHARS = 18
"""Characters of a response."""
REASON_CHARS = 56
RATIO_AXES = ("step", "tokens")
BEST_POLICY_NOTE = "*: by the best policy paid for, the guide's run included."
OTHER_BEST_POLICY_NOTE = "*: by the best policy paid for, where it is another (the guide's run counts)."
RATIO_NOTE = "above 1: cheaper; pairs of seeds that both reached it, of all."
NO_RATIO_NOTE = "no row: no pair of seeds reached it."


def fit(text: str, max_chars: int = NAME_CHARS) -> str:
    """A text without its middle where it is longer: `checkp..000@12`."""
    if len(text) <= max_chars:
        return text
    tail = (max_chars - 2) // 2
    return f"{text[: max_chars - 2 - tail]}..{text[len(text) - tail :]}"


def limit_rows(records: Sequence[Any], *, name: str, max_rows: int = MAX_ROWS) -> tuple[Sequence[Any], tuple[str, ...]]:
    """The last records, and a note where there are more."""
    if len(records) <= max_rows:
        return records, ()
    return records[-max_rows:], (f"The last {max_rows} of {len(records):,} {name}; --full shows all.",)


def mark_best_held(name: str, is_best_held: bool, *, max_chars: int = 16) -> str:
    """The name of a curve; with a star where it is that of the best policy held so far."""
    return f"{fit(name, max_chars)}{' *' * is_best_held}"


SHORT_CURVE = Column("method", lambda one: mark_best_held(one.method, one.curve == "best held", max_chars=CURVE_CHARS))


def name_column(heading: str, name: str | None = None, *, max_chars: int = NAME_CHARS) -> Column:
    """The attribute `name` (by default the heading) as text that fits; `-` where it is absent."""
    return Column(heading, lambda one: fit(str(getattr(one, name or heading) or "-"), max_chars))


def short_interval_column(heading: str, name: str, *, digits: int = 2, sign: str = "") -> Column:
    """The attributes `name`, `name_low` and `name_high` to two digits."""

    def cell(record: Any) -> str:
        value, low, high = (getattr(record, f"{name}{end}") for end in ("", "_low", "_high"))
        return format_short_interval(value, low, high, form=f"{sign}.{digits}f")

    return Column(heading, cell)


def format_short_interval(value: float | None, low: float | None, high: float | None, *, form: str = ".2f") -> str:
    """`0.36 [0.29, 0.43]`."""
    if value is None:
        return "-"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


# One run


def short_index_tables(entries: Sequence[CheckpointEntry]) -> tuple[Table, ...]:
    """Reward, accuracy and S of each checkpoint."""
    shown, notes = limit_rows(entries, name="checkpoints")
    columns = (
        *(name_column("branch"), text_column("step"), text_column("tier")),
        Column("size", lambda one: format_bytes(one.size_bytes)),
        bool_column("complete", "complete", yes=""),
        *(number_column("reward"), number_column("accuracy"), number_column("S", "signal")),
        count_column("scored for", "learner_step"),
    )
    return (build_table("Checkpoints", shown, columns, notes=notes, drops_empty=True),)


def short_metrics_tables(reports: Sequence[StepReport]) -> tuple[Table, ...]:
    """One row per branch, then the newest steps."""
    rows = tuple(
        (fit(one.branch), one.steps, _arrow(one.rewards), _arrow(one.entropies), format_count(one.tokens))
        for one in summarize_branches(reports)
    )
    notes = ("means over the first and over the last tenth of the steps",)
    header = ("branch", "steps", "reward", "entropy", "tokens")
    summary = Table(title="Training", header=header, rows=rows, notes=notes)
    columns = (
        *(name_column("branch"), text_column("step"), metric_column("reward", "reward")),
        Column("accuracy", lambda one: format_number(one.distinct_accuracy)),
        *(metric_column("entropy", "entropy"), metric_column("all wrong", "frac_all_wrong")),
        *(metric_column("length", "completions/mean_length"), metric_column("injected", "inject/slots")),
    )
    return summary, build_table("Newest steps", reports[-NUM_NEWEST:], columns, drops_empty=True)


def _arrow(ends: tuple[float | None, float | None]) -> str:
    return " -> ".join(format_number(one) for one in ends)


def short_evals_tables(reports: Sequence[EvalReport]) -> tuple[Table, ...]:
    """Accuracy and pass@k with intervals."""
    shown, notes = limit_rows(reports, name="evaluations")
    columns = (
        *(name_column("branch", max_chars=12), text_column("step")),
        *(short_interval_column("accuracy", "accuracy"), short_interval_column("pass@k", "pass_at_k")),
        *(text_column("k", "num_samples"), count_column("prompts", "num_prompts")),
        Column("truncated", lambda one: f"{one.truncated_fraction:.1%}"),
    )
    notes = ("accuracy: avg@k. 95 % intervals over prompts.", *notes)
    return (build_table("Held-out accuracy", shown, columns, notes=notes),)


def short_guides_tables(guides: Sequence[GuideCacheInfo]) -> tuple[Table, ...]:
    """Steps, source, prompts solved and tokens of each guide cache."""
    columns = (
        *(name_column("name", max_chars=16), name_column("branch", max_chars=12)),
        Column("for steps", lambda one: f"{one.learner_step + 1}-{one.learner_step + one.num_steps}"),
        Column("source", lambda one: fit(one.source.text, 15)),
        Column("solved", lambda one: f"{one.num_prompts_with_rollouts} of {one.num_prompts}"),
        *(count_column("tokens", "num_tokens"), bool_column("complete", "complete")),
    )
    table = build_table("Guide caches", guides, columns, notes=("solved: prompts with a verified response.",))
    return (drop_column(table, "complete") if all(one.complete for one in guides) else table,)


def drop_column(table: Table, heading: str) -> Table:
    """The table without one column."""
    kept = [place for place, name in enumerate(table.header) if name != heading]
    header = tuple(table.header[place] for place in kept)
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return Table(title=table.title, header=header, rows=rows, notes=table.notes)


def short_lineage_tables(segments: Sequence[Segment]) -> tuple[Table, ...]:
    """Segments, oldest first."""
    shown, notes = limit_rows(segments, name="segments")
    columns = (
        *(name_column("branch"), name_column("parent"), text_column("from step", "fork_step")),
        *(name_column("guide", "guide_cache", max_chars=16), count_column("until", "guide_until")),
        Column("merged start", lambda one: fit(one.merge_spec, 24)),
        Column("", lambda one: "removed" if one.removed else "scout" if one.is_scout else ""),
    )
    return (build_table("Lineage", shown, columns, notes=notes, drops_empty=True),)


def short_rollouts_tables(views: Sequence[RolloutView]) -> tuple[Table, ...]:
    """The last responses, cut in the middle."""
    shown, notes = limit_rows(views, name="rollouts")
    columns = (
        text_column("step"),
        Column("prompt", lambda one: fit(one.rollout.prompt_id, 14)),
        Column("source", lambda one: fit(one.rollout.source, 8)),
        Column("verdict", lambda one: one.rollout.verdict or "-"),
        Column("question", lambda one: fit(" ".join(one.prompt_text.split()), TEXT_CHARS - 4)),
        Column("response", lambda one: fit(" ".join(one.rollout.text.split()), TEXT_CHARS)),
    )
    return (build_table(f"Rollouts of {views[-1].branch}", shown, columns, notes=notes),)


def short_history_tables(histories: Sequence[PromptHistory]) -> tuple[Table, ...]:
    """Question and reference answer; the history is the sentence before them."""
    return tuple(
        Table(
            title=f"Prompt {fit(one.prompt_id, 60)}",
            header=("question", "reference answer"),
            rows=((" ".join(one.prompt_text.split()), " ".join(one.reference_answer.split())),),
        )
        for one in histories
    )


def short_visits_tables(visits: Sequence[PromptVisit]) -> tuple[Table, ...]:
    """One row per step: how many were correct, and what was injected."""
    rows = tuple(
        (
            fit(one.branch),
            str(one.step),
            f"{one.num_correct} of {one.num_on_policy}",
            fit("; ".join(map(describe_source, one.off_policy_rollouts)) or "-", 24),
        )
        for one in visits[-MAX_ROWS:]
    )
    notes = ("--full shows the responses.",)
    return (Table(title="Visits", header=("branch", "step", "correct", "injected"), rows=rows, notes=notes),)


def short_groups_tables(views: Sequence[GroupView]) -> tuple[Table, ...]:
    """Accuracy and injection of the last groups."""
    shown, notes = limit_rows(views, name="groups")
    columns = (
        text_column("step"),
        Column("prompt", lambda one: fit(one.group.prompt.prompt_id, 24)),
        Column("rollouts", lambda one: str(len(one.group.rollouts))),
        Column("accuracy", lambda one: format_number(one.group.on_policy_accuracy)),
        Column("injection", lambda one: one.group.injection_status),
    )
    return (build_table(f"Groups of {views[-1].branch}", shown, columns, notes=notes),)


def short_costs_tables(costs: Sequence[CostToThreshold]) -> tuple[Table, ...]:
    """Steps, tokens and seconds, and the ratio of each to the first curve."""
    rows = tuple(
        (
            mark_best_held(one.name, one.is_best_held),
            f"{one.threshold:.2f}",
            *(format_count(value) for value in (one.step, one.total_steps, one.total_tokens)),
            *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        )
        for one, ratios in compare_costs(costs)
    )
    header = ("branch", "accuracy", "step", "steps paid", "tokens paid", "by step", "by tokens")
    notes = (
        f"by: cost of {costs[0].name} / this cost; above 1 it is cheaper than {costs[0].name}.",
        "paid: with the guide's training, steps rolled back, scoring and samples.",
        *((BEST_POLICY_NOTE,) * any(one.is_best_held for one in costs)),
    )
    return (Table(title="Cost of reaching a held-out accuracy", header=header, rows=rows, notes=notes),)


def short_account_tables(accounts: Sequence[RunCosts]) -> tuple[Table, ...]:
    """The sums of everything that the run executed."""
    columns = (
        *(name_column("seen from", "branch"), count_column("updates"), count_column("all tokens", "tokens")),
        *(count_column("abandoned", "abandoned_tokens"), number_column("seconds", digits=1)),
    )
    notes = ("abandoned: tokens of steps outside the branch's ancestry.",)
    return (build_table("Everything executed", accounts, columns, notes=notes),)


def short_runs_tables(runs: Sequence[RunListing]) -> tuple[Table, ...]:
    """Runs by path: steps, best accuracy and state."""
    columns = (
        *(name_column("run", max_chars=20), name_column("recipe", max_chars=10)),
        Column("branches", lambda one: str(len(one.branches))),
        Column("step", lambda one: f"{one.step}/{one.num_steps}"),
        number_column("best", "best_accuracy", digits=2),
        *(Column("size", lambda one: format_bytes(one.size_bytes)), text_column("state")),
    )
    return (build_table("Runs", runs, columns, notes=("best: held-out accuracy of any branch.",)),)


# Guides


def short_scores_tables(scores: Sequence[CandidateScore]) -> tuple[Table, ...]:
    """Q_net, V, S and value of each candidate."""
    ordered = sort_candidates(scores)
    columns = (
        Column("  candidate", lambda one: f"{'*' if one.is_selected else ' '} {fit(one.candidate, 16)}"),
        Column("ahead", lambda one: format_count(one.distance)),
        *(short_interval_column("Q_net", "quality_net"), number_column("V", "variance", digits=2)),
        *(short_interval_column("S", "signal"), number_column("value", digits=2)),
    )
    notes = [
        f"*: selected. S = Q_net/V, {'V a distance, ' * (name_variance(ordered) != 'V')}95 % intervals.",
        "value: forecast steps saved / price; worth it from 1 on.",
        *(f"{fit(one.candidate)}: V rests on a few samples." for one in ordered if one.is_unreliable),
        "--full adds Q, p(best), price, V of every kind, all intervals and rules.",
    ]
    return (build_table("Guide candidates", ordered, columns, notes=notes),)


def short_gain_tables(candidates: Sequence[CandidateGain]) -> tuple[Table, ...]:
    """Gain, Q_net and price of each candidate, one table per learner."""
    columns = (
        *(name_column("candidate"), Column("ahead", lambda one: format_count(one.distance))),
        short_interval_column("gain", "gain", digits=3, sign="+"),
        number_column("Q_net", "quality_net", digits=2),
        Column("solved", lambda one: f"{one.num_solved}/{one.num_prompts}"),
        number_column("price", digits=1),
    )
    places = dict.fromkeys((one.branch, one.learner_step) for one in candidates)
    tables = []
    for branch, step in places:
        own = [one for one in candidates if (one.branch, one.learner_step) == (branch, step)]
        notes = (
            f"gain: held-out accuracy above {own[0].accuracy_unguided:.3f} without a guide.",
            "price: in training steps.",
        )
        tables.append(build_table(f"Gain at step {step} of {branch}", own, columns, notes=notes))
    return tuple(tables)


def short_rule_tables(results: Sequence[RuleResult]) -> tuple[Table, ...]:
    """How well each rule predicts the gain."""
    columns = (
        *(name_column("rule", max_chars=24), text_column("kind")),
        short_interval_column("rank correlation", "rank_correlation"),
        short_interval_column("regret", "regret", digits=3),
    )
    notes = ("regret: the largest gain minus that of the rule's choice.",)
    return (build_table("Selection rules", results, columns, notes=notes),)


# AutoNPO


def short_transitions_tables(transitions: Sequence[Transition]) -> tuple[Table, ...]:
    """Every transition with what it rests on."""
    rows = tuple((str(one.step), one.event, _shorten_evidence(one)) for one in transitions)
    is_simulated = any(one.evidence.get("assumed") or one.evidence.get("simulated") for one in transitions)
    title = "What AutoNPO would have done" if is_simulated else "What AutoNPO did"
    has_probes = any(one.evidence.get("scores") for one in transitions)
    notes = (
        *(("assumed: every trigger counts as accepted, as metrics cannot be probed.",) * is_simulated),
        *(("--full shows Q, V and S of each probe.",) * has_probes),
    )
    table = drop_empty_columns(Table(title=title, header=("step", "event", "based on"), rows=rows, notes=notes))
    return (table, *rung_tables(transitions, is_short=True))


def _shorten_evidence(one: Transition) -> str:
    if one.event == "started":
        return f"on {one.state.branch}"
    text = describe_evidence(one)
    if one.event in ("rolled_back", "rung_applied") and not one.evidence.get("assumed"):
        text = f"{text}, on {one.state.branch}"
    return shorten(text, REASON_CHARS, placeholder=" ...")


def short_no_trigger_tables(spans: Sequence[NonTriggerSpan]) -> tuple[Table, ...]:
    """Each reason with its number of steps."""
    totals: dict[str, int] = {}
    for span in spans:
        totals[span.reason] = totals.get(span.reason, 0) + span.num_steps
    rows = tuple(
        (REASON_MEANINGS.get(reason, reason), format_count(totals[reason]))
        for reason in sorted(totals, key=lambda reason: -totals[reason])
    )
    return (Table(title="Steps without a trigger", header=("because", "steps"), rows=rows),)


# Several runs


def short_summary_tables(methods: Sequence[MethodSummary]) -> tuple[Table, ...]:
    """Final accuracy and costs of each method."""
    columns = (
        *(Column("method", lambda one: fit(one.method, METHOD_CHARS)), SEEDS),
        Column("final accuracy", lambda one: _estimate(one.final_accuracy)),
        Column("tokens", lambda one: format_cost(one.mean_costs.get("tokens"))),
        Column("seconds", lambda one: format_cost(one.mean_costs.get("seconds"))),
    )
    mismatched = [f"MISMATCH: {one.method}: {change}" for one in methods for change in one.mismatched_settings]
    notes = (describe_final(methods), "Costs include guides, scoring and rolled-back steps.", *mismatched)
    return (build_table("Methods", methods, columns, notes=notes, drops_empty=True),)


def short_differences_tables(differences: Sequence[MethodDifference]) -> tuple[Table, ...]:
    """Final accuracy minus the baseline's."""
    columns = (
        *(Column("method", lambda one: fit(one.method, METHOD_CHARS)), text_column("pairs", "num_pairs")),
        Column("final accuracy", lambda one: _estimate(one.final_accuracy, sign="+")),
        Column("not lower", lambda one: f"{one.num_not_lower} of {one.num_pairs}" if one.num_pairs else "-"),
    )
    return (build_table(f"Method minus {differences[0].baseline}", differences, columns, drops_empty=True),)


def short_threshold_tables(found: Sequence[MethodTimeToThreshold]) -> tuple[Table, ...]:
    """Step, tokens and seconds to each threshold; the best policy held only where it is not the method's own."""

    def outcome(one: MethodTimeToThreshold) -> tuple[int, Mapping[str, float]]:
        return one.num_reached, {axis: cost for axis, cost in one.costs.items() if axis != "step"}

    own = {(one.method, one.threshold): outcome(one) for one in found if one.curve == "own"}
    found = [one for one in found if one.curve == "own" or outcome(one) != own.get((one.method, one.threshold))]

    def cost(one: MethodTimeToThreshold, axis: str) -> str:
        return f"{'>= ' * (one.is_censored and axis in one.costs)}{format_cost(one.costs.get(axis))}"

    columns = (
        *(SHORT_CURVE, number_column("accuracy", "threshold", digits=2)),
        Column("reached", lambda one: f"{one.num_reached} of {one.num_runs}"),
        *(Column(axis, lambda one, axis=axis: cost(one, axis)) for axis in ("step", "tokens", "seconds")),
    )
    notes = (
        *((">=: lower bound, as some seed did not reach it.",) * any(one.is_censored for one in found)),
        *((OTHER_BEST_POLICY_NOTE,) * any(one.curve != "own" for one in found)),
    )
    return (build_table("Cost of reaching a held-out accuracy", found, columns, notes=notes, drops_empty=True),)


def short_speedup_tables(found: Sequence[SpeedUp]) -> tuple[Table, ...]:
    """Ratios by step and by tokens, of the pairs of seeds that both reached the threshold; no row without any, nor for
    the best policy held where it is the method's own."""
    own = {(one.method, one.threshold): one.ratio_if_reached.get("tokens") for one in found if one.curve == "own"}
    known = [one for one in found if any(axis in one.ratio_if_reached for axis in RATIO_AXES)]
    rows = [
        one
        for one in known
        if one.curve == "own" or one.ratio_if_reached.get("tokens") != own.get((one.method, one.threshold))
    ]

    def pairs(one: SpeedUp) -> str:
        ratio = one.ratio_if_reached.get("tokens")
        return "-" if ratio is None else f"{ratio.num_used}/{ratio.num_total}"

    columns = (
        *(SHORT_CURVE, number_column("accuracy", "threshold", digits=2)),
        Column("pairs", pairs),
        *(
            Column(f"by {axis}", lambda one, axis=axis: _estimate(one.ratio_if_reached.get(axis)))
            for axis in RATIO_AXES
        ),
    )
    title = f"Cost of {found[0].baseline} / cost of the method"
    notes = (RATIO_NOTE, *((NO_RATIO_NOTE,) * (len(known) < len(found))))
    return (build_table(title, rows, columns, notes=notes, drops_empty=True),) if rows else ()


def _estimate(one: Estimate | None, *, sign: str = "") -> str:
    return "-" if one is None else format_short_interval(one.value, one.low, one.high, form=f"{sign}.2f")


def no_tables(records: Sequence[Any]) -> tuple[Table, ...]:
    """Nothing: these records are shown with --full."""
    return ()


SHORT_TABLES: Mapping[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    **TABLES,
    StepReport: short_metrics_tables,
    CheckpointEntry: short_index_tables,
    GuideCacheInfo: short_guides_tables,
    CandidateScore: short_scores_tables,
    EvalReport: short_evals_tables,
    CostToThreshold: short_costs_tables,
    MethodSummary: short_summary_tables,
    MethodDifference: short_differences_tables,
    MethodTimeToThreshold: short_threshold_tables,
    SpeedUp: short_speedup_tables,
    MethodHysteresis: no_tables,
    CandidateGain: short_gain_tables,
    RuleResult: short_rule_tables,
    Transition: short_transitions_tables,
    ProbeResult: no_tables,
    NonTriggerSpan: short_no_trigger_tables,
    RunCosts: short_account_tables,
    Segment: short_lineage_tables,
    RolloutView: short_rollouts_tables,
    GroupView: short_groups_tables,
    PromptHistory: short_history_tables,
    PromptVisit: short_visits_tables,
    RunListing: short_runs_tables,
    Allocation: short_allocations_tables,
}
"""The tables of each kind of record without `--full`, in the order of `TABLES`."""
