"""Tables of `npo compare` and of the tuning of `npo bench`. A value from a part of the seeds says how many."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from npo_cli.report.table import (
    Column,
    Table,
    build_table,
    format_count,
    format_interval,
    format_number,
    number_column,
    text_column,
)
from npo_cli.types.comparison import (
    AXES,
    Axis,
    Estimate,
    MethodDifference,
    MethodHysteresis,
    MethodSummary,
    MethodTimeToThreshold,
    SpeedUp,
)
from npo_cli.types.views import TunedSetting

RESAMPLED_OVER = {
    "seeds and prompts": "seeds and held-out prompts",
    "seeds": "seeds only (no results per prompt were saved)",
    "prompts": "held-out prompts only (one seed: nothing is known of other seeds)",
    "nothing": "nothing (one seed, and no results per prompt were saved)",
}
"""What the intervals are resampled over, by `resampling_unit`."""


METHOD = text_column("method")
CURVE = Column("method", lambda one: one.method if one.curve == "own" else f"{one.method}, {one.curve}")
BEST_HELD_NOTE = "best held: by the best policy that the method had paid for, its scout's included."
HYSTERESIS_NOTE = (
    "total cost of the method = that of the unguided run + [steps of its student to a + guides + probes] - H(a): "
    "where H is 0, rolling back is pure loss by total cost."
)
SEEDS = Column("seeds", lambda one: str(len(one.seeds)))


def summary_tables(methods: Sequence[MethodSummary]) -> tuple[Table, ...]:
    """What each method reached, what it cost, how it trained, and how its settings differ from the first method's."""
    return (_accuracy_table(methods), _training_table(methods), *_settings_table(methods))


def describe_final(methods: Sequence[MethodSummary]) -> str:
    """What a final accuracy is."""
    return f"final: mean of the last 3 evaluations up to step {methods[0].horizon}."


def _accuracy_table(methods: Sequence[MethodSummary]) -> Table:
    columns = (
        *(METHOD, SEEDS, Column("final accuracy", lambda one: _plain(one.final_accuracy))),
        *_area_columns(_plain),
    )
    notes = (
        f"{describe_final(methods)} area: mean accuracy along an axis, over the range that all methods cover.",
        *_resampling_notes(methods),
    )
    return build_table("Held-out accuracy", methods, columns, notes=notes, drops_empty=True)


def _area_columns(format_estimate: Callable[[Estimate | None], str]) -> tuple[Column, ...]:
    return tuple(Column(f"area by {axis}", partial(_area_cell, axis, format_estimate)) for axis in AXES)


def _area_cell(axis: Axis, format_estimate: Callable[[Estimate | None], str], one: Any) -> str:
    return format_estimate(one.areas.get(axis))


def _resampling_notes(some: Sequence[MethodSummary | MethodDifference]) -> tuple[str, ...]:
    """What the intervals are resampled over; by method where it is not the same for all."""
    methods: dict[str, list[str]] = {}
    for one in some:
        methods.setdefault(one.resampling_unit, []).append(one.method)
    return tuple(
        f"{'95 % intervals' if len(methods) == 1 else ', '.join(names)}: resampled over {RESAMPLED_OVER[unit]}."
        for unit, names in methods.items()
    )


def _training_table(methods: Sequence[MethodSummary]) -> Table:
    columns = (
        *(METHOD, SEEDS),
        *(Column(axis, partial(_mean_cost_cell, axis)) for axis in AXES[1:]),
        Column("teacher tokens", lambda one: format_cost(one.teacher_tokens or None)),
        Column("whole run", lambda one: format_cost(one.run_tokens)),
        *(Column(f"entropy {25 * n}-{25 * n + 25} %", partial(_entropy_cell, n)) for n in range(4)),
        Column("injected per step", lambda one: format_number(one.injections_per_step or None, digits=2)),
        number_column("guide gradient share", "guide_gradient_share"),
    )
    notes = [
        "updates to seconds: mean over seeds, with guides, scoring, probes and rolled-back training.",
        "whole run: all tokens that its runs generated, with branches of other methods and abandoned ones.",
        "entropy: while training, nats per token.",
    ]
    if any(one.teacher_tokens for one in methods):
        notes.append("teacher tokens: response tokens that a dense target's teacher read; no part of the tokens.")
    if any(one.guide_gradient_share for one in methods):
        notes.append("guide gradient share: of the gradient norm, in steps with an injected rollout.")
    title = f"Cost of reaching step {methods[0].horizon}"
    return build_table(title, methods, columns, notes=notes, drops_empty=True)


def _mean_cost_cell(axis: Axis, one: MethodSummary) -> str:
    return format_cost(one.mean_costs.get(axis))


def _entropy_cell(quarter: int, one: MethodSummary) -> str:
    return format_number(one.entropies[quarter])


def _settings_table(methods: Sequence[MethodSummary]) -> tuple[Table, ...]:
    rows = tuple(
        (one.method, kind, change)
        for one in methods
        for kind, changes in (("MISMATCH", one.mismatched_settings), ("method", one.changed_settings))
        for change in changes
    )
    header = ("method", "kind", f"{methods[0].method} -> method")
    return (Table(title="Differences of settings", header=header, rows=rows),) if rows else ()


def differences_tables(differences: Sequence[MethodDifference]) -> tuple[Table, ...]:
    """Each method minus the baseline."""
    columns = (
        *(METHOD, text_column("pairs", "num_pairs")),
        Column("final accuracy", lambda one: _signed(one.final_accuracy)),
        Column("not lower", lambda one: f"{one.num_not_lower} of {one.num_pairs}" if one.num_pairs else "-"),
        *_area_columns(_signed),
    )
    notes = (*_pairing_notes(differences), *_resampling_notes(differences))
    title = f"Method minus {differences[0].baseline}"
    return (build_table(title, differences, columns, notes=notes, drops_empty=True),)


def _pairing_notes(differences: Sequence[MethodDifference]) -> tuple[str, ...]:
    notes = []
    for one in differences:
        if not one.num_pairs:
            notes.append(f"{one.method} shares no seed with {one.baseline}: not paired.")
        elif one.num_prompts is None:
            notes.append(f"{one.method}: paired by seed; not by prompt (no common held-out prompts are known).")
        else:
            notes.append(f"{one.method}: paired by seed and by prompt, {one.num_prompts} prompts per pair.")
    return tuple(notes)


def time_to_threshold_tables(found: Sequence[MethodTimeToThreshold]) -> tuple[Table, ...]:
    """Mean cost of reaching each threshold; lower bounds where a seed did not reach it."""
    horizons = found[0].horizons
    axes = [axis for axis in AXES if axis in horizons]
    columns = (
        *(CURVE, number_column("accuracy", "threshold", digits=2)),
        Column("reached", lambda one: f"{one.num_reached} of {one.num_runs}"),
        *(Column(axis, partial(_bounded_cost_cell, axis)) for axis in axes),
        *(Column(f"min({axis}, {format_cost(horizons[axis])})", partial(_restricted_cell, axis)) for axis in axes),
    )
    notes = ["min(cost, h): mean up to a cost h that every seed has spent, whether it reached the threshold or not."]
    if any(one.is_censored for one in found):
        notes.insert(0, ">=: a seed that did not reach it counts with its cost at the end: the mean is a lower bound.")
    notes += [BEST_HELD_NOTE] * any(one.curve == "best held" for one in found)
    return (build_table("Cost of reaching a held-out accuracy", found, columns, notes=notes),)


def _bounded_cost_cell(axis: Axis, one: MethodTimeToThreshold) -> str:
    return f"{'>= ' if one.is_censored and axis in one.costs else ''}{format_cost(one.costs.get(axis))}"


def _restricted_cell(axis: Axis, one: MethodTimeToThreshold) -> str:
    return format_cost(one.restricted_means.get(axis))


def speedup_tables(found: Sequence[SpeedUp]) -> tuple[Table, ...]:
    """Ratios of costs, from the pairs that reached the threshold and from all seeds."""
    baseline = found[0].baseline
    reached = build_table(
        f"Cost of {baseline} / cost of the method, pairs of seeds that both reached it",
        found,
        _ratio_columns("ratio_if_reached", shows_pairs=True),
        notes=("above 1: cheaper; geometric mean, Student's interval over pairs; pairs that reached it, of all.",),
        drops_empty=True,
    )
    notes = ["ratio of the means of min(cost, h); Student's interval over the pairs."]
    if any(ratio.num_used < ratio.num_total for one in found for ratio in one.restricted_mean_ratio.values()):
        notes.append("(n of N): only n seeds are common to both.")
    restricted = build_table(
        f"Cost of {baseline} / cost of the method, all seeds, up to the common cost h",
        found,
        _ratio_columns("restricted_mean_ratio", shows_pairs=False),
        notes=notes,
        drops_empty=True,
    )
    return tuple(table for table in (reached, restricted) if len(table.header) > 2)


def hysteresis_tables(found: Sequence[MethodHysteresis]) -> tuple[Table, ...]:
    """H(a) of each method, with its interval or as a bound."""
    columns = (
        METHOD,
        *(number_column("from a", "accuracy", digits=2), number_column("target", digits=2)),
        *(Column("H(a), steps", _hysteresis_cell), Column("seeds", _hysteresis_seeds)),
    )
    title = f"Hysteresis: steps from accuracy a to the target, {found[0].baseline} minus the replayed branch"
    notes = [HYSTERESIS_NOTE, "seeds whose learner had accuracy a before the replay say nothing."]
    if any(one.bound != "exact" for one in found):
        notes.append(">=, <=: the unguided run, or the replay, of some seed never reached the target.")
    return (build_table(title, found, columns, notes=notes),)


def _hysteresis_cell(one: MethodHysteresis) -> str:
    sign = {"exact": "", "at least": ">= ", "at most": "<= "}[one.bound]
    steps = one.steps
    known = "" if steps.low is None or steps.high is None else f" [{steps.low:+.1f}, {steps.high:+.1f}]"
    return f"{sign}{steps.value:+.1f}{known}"


def _hysteresis_seeds(one: MethodHysteresis) -> str:
    return f"{one.steps.num_used} of {one.steps.num_total}"


def _ratio_columns(attribute: str, *, shows_pairs: bool) -> tuple[Column, ...]:
    ratios = (Column(f"by {axis}", partial(_ratio_cell, attribute, axis, shows_pairs)) for axis in AXES)
    return (CURVE, number_column("accuracy", "threshold", digits=2), *ratios)


def _ratio_cell(attribute: str, axis: Axis, shows_pairs: bool, one: SpeedUp) -> str:
    return format_ratio(getattr(one, attribute).get(axis), pairs=shows_pairs)


def _plain(one: Estimate | None) -> str:
    if one is None or one.low is None or one.high is None:
        return format_number(one and one.value)
    return format_interval(one.value, one.low, one.high)


def _signed(one: Estimate | None) -> str:
    if one is None or one.low is None or one.high is None:
        return "-" if one is None else f"{one.value:+.3f}"
    return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def format_ratio(one: Estimate | None, *, pairs: bool) -> str:
    """`1.67x [1.20, 2.30] (3 of 3)`: the seeds that it rests on with `pairs`, or where they are not all."""
    if one is None:
        return "-"
    known = "" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:.2f}x{known}" + (
        f" ({one.num_used} of {one.num_total})" if pairs or one.num_used < one.num_total else ""
    )


def format_cost(value: float | None) -> str:
    """Counts whole; seconds below 1000 to a tenth."""
    if value is None:
        return "-"
    return format_count(round(value)) if value >= 1000 or value == round(value) else f"{value:,.1f}"


COMPARE_TABLES: dict[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    MethodSummary: summary_tables,
    MethodDifference: differences_tables,
    MethodTimeToThreshold: time_to_threshold_tables,
    SpeedUp: speedup_tables,
    MethodHysteresis: hysteresis_tables,
}
"""Part of `tables.TABLES`."""


def tuning_tables(found: Sequence[TunedSetting]) -> tuple[Table, ...]:
    """One row per setting of the grid, one column per method."""
    settings = list(dict.fromkeys(setting for one in found for setting in one.areas))
    rows = tuple(
        (setting, *(format_number(one.areas.get(setting)) + " *" * (setting == one.setting) for one in found))
        for setting in settings
    )
    note = "held-out accuracy averaged over tokens, mean over the tuning seeds; * selected"
    header = ("setting", *(one.method for one in found))
    return (Table(title="Selected settings", header=header, rows=rows, notes=(note,)),)
