"""What `npo compare` found, as tables. A figure that rests on a part of the seeds says on how many.

What the tuning of a comparison found, as a table.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npo_cli.report.table import Table, drop_empty_columns, format_count, format_interval, format_number
from npo_cli.types.comparison import AXES, Estimate, MethodDifference, MethodSummary, MethodTimeToThreshold, SpeedUp
from npo_cli.types.views import TunedSetting

RESAMPLED_OVER = {
    "seeds and prompts": "seeds and held-out prompts",
    "seeds": "seeds alone, as outcomes were not kept prompt by prompt,",
    "prompts": "held-out prompts alone, as there is one seed: they say nothing of another seed;",
    "nothing": "nothing: one seed, and outcomes were not kept prompt by prompt;",
}
"""What intervals come from, by `over`."""


def summary_tables(arms: Sequence[MethodSummary]) -> tuple[Table, ...]:
    """What each arm reached, what it took and how it trained, and in what its settings differ from the first's."""
    return (_accuracy_table(arms), _training_table(arms), *_settings_table(arms))


def _accuracy_table(arms: Sequence[MethodSummary]) -> Table:
    header = ("arm", "seeds", "final accuracy", *(f"area by {axis}" for axis in AXES))
    rows = tuple(
        (one.method, str(len(one.seeds)), _plain(one.final_accuracy), *(_plain(one.areas.get(axis)) for axis in AXES))
        for one in arms
    )
    notes = (
        f"final: mean of the last 3 evaluations up to step {arms[0].horizon}. "
        "area: mean accuracy along an axis, over the stretch that all arms cover.",
        *_drawn_notes(arms),
    )
    return drop_empty_columns(Table(title="Held-out accuracy", header=header, rows=rows, notes=notes))


def _drawn_notes(some: Sequence[MethodSummary | MethodDifference]) -> tuple[str, ...]:
    """What the intervals come from; by arm where it is not the same for all."""
    kinds = {
        one.resampling_unit: [other.method for other in some if other.resampling_unit == one.resampling_unit]
        for one in some
    }
    return tuple(
        f"{'95 % intervals' if len(kinds) == 1 else ', '.join(names)}: resampled over {RESAMPLED_OVER[over]}".rstrip(
            ";,"
        )
        + "."
        for over, names in kinds.items()
    )


def _training_table(arms: Sequence[MethodSummary]) -> Table:
    quarters = tuple(f"entropy {25 * place}-{25 * place + 25} %" for place in range(4))
    header = ("arm", "seeds", *AXES[1:], "whole run", *quarters, "slots a step", "grad share")
    rows = tuple(
        (
            *(one.method, str(len(one.seeds))),
            *(_cost(one.mean_costs.get(axis)) for axis in AXES[1:]),
            _cost(one.run_tokens),
            *(format_number(entropy) for entropy in one.entropies),
            *(
                format_number(one.injections_per_step, digits=2) if one.injections_per_step else "-",
                format_number(one.guide_gradient_share),
            ),
        )
        for one in arms
    )
    notes = (
        "updates to seconds: mean over seeds; guides, scoring, probes and what was rolled back are counted.",
        "whole run: all tokens that its runs ever generated, branches of other arms and abandoned ones included.",
        "entropy: of training, nats a token.",
        *(
            ("grad share: of the gradient norm, in steps with a guide slot.",)
            * any(one.guide_gradient_share for one in arms)
        ),
    )
    title = f"What it took to stand at step {arms[0].horizon}"
    return drop_empty_columns(Table(title=title, header=header, rows=rows, notes=notes))


def _settings_table(arms: Sequence[MethodSummary]) -> tuple[Table, ...]:
    rows = tuple(
        (one.method, word, change)
        for one in arms
        for word, changes in (("NOT ALIKE", one.mismatched_settings), ("method", one.changed_settings))
        for change in changes
    )
    header = ("arm", "what", f"{arms[0].method} -> arm")
    return (Table(title="In what the settings differ", header=header, rows=rows),) if rows else ()


def differences_tables(found: Sequence[MethodDifference]) -> tuple[Table, ...]:
    """Each arm minus the baseline."""
    header = ("arm", "pairs", "final accuracy", "not lower", *(f"area by {axis}" for axis in AXES))
    rows = tuple(
        (
            *(one.method, str(one.num_pairs), _signed(one.final_accuracy)),
            f"{one.num_not_lower} of {one.num_pairs}" if one.num_pairs else "-",
            *(_signed(one.areas.get(axis)) for axis in AXES),
        )
        for one in found
    )
    notes = (*_pairing_notes(found), *_drawn_notes(found))
    return (drop_empty_columns(Table(title=f"Arm minus {found[0].baseline}", header=header, rows=rows, notes=notes)),)


def _pairing_notes(found: Sequence[MethodDifference]) -> tuple[str, ...]:
    notes = []
    for one in found:
        if not one.num_pairs:
            notes.append(f"{one.method} shares no seed with {one.baseline}: not paired.")
        elif one.num_prompts is None:
            notes.append(f"{one.method}: paired by seed; not by prompt, as no held-out prompt is known to be common.")
        else:
            notes.append(f"{one.method}: paired by seed and by prompt, {one.num_prompts} prompts a pair.")
    return tuple(notes)


def time_to_threshold_tables(found: Sequence[MethodTimeToThreshold]) -> tuple[Table, ...]:
    """Mean cost of reaching each threshold; lower bounds where a seed never did."""
    horizons = found[0].horizons
    axes = [axis for axis in AXES if axis in horizons]
    header = (
        *("arm", "accuracy", "reached", *axes),
        *(f"min({axis}, {_cost(horizons[axis])})" for axis in axes),
    )
    rows = tuple(
        (
            *(one.method, format_number(one.threshold, digits=2), f"{one.num_reached} of {one.num_runs}"),
            *(f"{'>= ' if one.is_censored else ''}{_cost(one.costs[axis])}" for axis in axes),
            *(_cost(one.restricted_means[axis]) for axis in axes),
        )
        for one in found
    )
    bound = ">=: some seed never arrived and counts what it had spent at its end, so the mean is a lower bound."
    notes = (
        *((bound,) * any(one.is_censored for one in found)),
        "min(cost, h): mean up to a cost h that every seed lived to see, arrived or not.",
    )
    return (Table(title="Cost of reaching a held-out accuracy", header=header, rows=rows, notes=notes),)


def speedup_tables(found: Sequence[SpeedUp]) -> tuple[Table, ...]:
    """Ratios of costs, from the pairs that arrived and from all seeds."""
    baseline = found[0].baseline
    header = ("arm", "accuracy", *(f"by {axis}" for axis in AXES))

    def rows(of: Callable[[SpeedUp], Mapping[str, Estimate]], *, pairs: bool) -> tuple[tuple[str, ...], ...]:
        return tuple(
            (
                *(one.method, format_number(one.threshold, digits=2)),
                *(_ratio(of(one).get(axis), pairs=pairs) for axis in AXES),
            )
            for one in found
        )

    arrived = Table(
        title=f"Cost of {baseline} / cost of the arm, in pairs of seeds that both arrived",
        header=header,
        rows=rows(lambda one: one.ratio_if_reached, pairs=True),
        notes=("above 1 the arm is cheaper; Student's interval over the pairs; those that arrived, of all pairs.",),
    )
    partly = any(ratio.num_used < ratio.num_total for one in found for ratio in one.restricted_mean_ratio.values())
    restricted = Table(
        title=f"Cost of {baseline} / cost of the arm, arrived or not, up to the common cost h",
        header=header,
        rows=rows(lambda one: one.restricted_mean_ratio, pairs=False),
        notes=(
            "ratio of the means of min(cost, h); Student's interval over the pairs.",
            *(("(n of N): only so many seeds are common to both.",) * partly),
        ),
    )
    return tuple(table for table in map(drop_empty_columns, (arrived, restricted)) if len(table.header) > 2)


def _plain(one: Estimate | None) -> str:
    if one is None or one.low is None or one.high is None:
        return format_number(one and one.value)
    return format_interval(one.value, one.low, one.high)


def _signed(one: Estimate | None) -> str:
    if one is None or one.low is None or one.high is None:
        return "-" if one is None else f"{one.value:+.3f}"
    return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def _ratio(one: Estimate | None, *, pairs: bool) -> str:
    if one is None:
        return "-"
    known = "" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:.2f}x{known}" + (
        f" ({one.num_used} of {one.num_total})" if pairs or one.num_used < one.num_total else ""
    )


def _cost(value: float | None) -> str:
    """Counts whole; seconds below 1000 to a tenth."""
    if value is None:
        return "-"
    return format_count(round(value)) if value >= 1000 or value == round(value) else f"{value:,.1f}"


COMPARE_TABLES: dict[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    MethodSummary: summary_tables,
    MethodDifference: differences_tables,
    MethodTimeToThreshold: time_to_threshold_tables,
    SpeedUp: speedup_tables,
}
"""Merged into the table of all records."""


def tuning_tables(found: Sequence[TunedSetting]) -> tuple[Table, ...]:
    """One row a method, one column a setting of the grid."""
    settings = list(dict.fromkeys(setting for one in found for setting in one.areas))
    rows = tuple(
        (one.method, *(format_number(one.areas.get(setting)) for setting in settings), one.setting) for one in found
    )
    note = "held-out accuracy averaged over the steps, means over the tuning seeds"
    return (Table(title="Settings chosen", header=("method", *settings, "chosen"), rows=rows, notes=(note,)),)
