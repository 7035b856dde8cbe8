"""Tables of costs: of reaching each held-out accuracy, and by kind of work."""

from collections.abc import Sequence

from npo_cli.report.table import Column, Table, build_table, count_column, format_count, format_number, text_column
from npo_cli.types.costs import ActivityCost, CostToThreshold


def cost_to_threshold_tables(costs: Sequence[CostToThreshold]) -> tuple[Table, ...]:
    """What every curve had cost at each threshold, and the ratio to the first curve on every axis.

    Wall time is an axis where it is known, forward passes where they are more than tokens. What a teacher read is shown
    where there is one.
    """
    timed = any(one.total_seconds for one in costs)
    twice = any((one.total_forwards or 0) > (one.total_tokens or 0) for one in costs)
    more = ("seconds",) * timed + ("forwards",) * twice
    totals = ("step", "total steps", "total tokens", *(f"total {axis}" for axis in more))
    ratios = ("by step", "by total steps", "by total tokens", *(f"by {COST_AXIS_NAMES[axis]}" for axis in more))
    baselines = _find_baselines(costs)
    taught = any(one.total_teacher_tokens for one in costs)
    rows = tuple(
        (*_threshold_row(one, baseline=baselines.get(one.threshold), more=more), *((_teacher_cell(one),) * taught))
        for one in costs
    )
    notes = (
        f"by ...: cost of {costs[0].name} divided by this cost; above 1 it is faster than {costs[0].name}.",
        "total: includes training of the guide, rolled-back steps, scoring, probes and guide samples.",
        *((BEST_HELD_NOTE,) * any(one.is_best_held for one in costs)),
        *((FORWARDS_NOTE,) * twice),
        *((TEACHER_NOTE,) * taught),
    )
    header = ("branch", "accuracy", *totals, *ratios, *(("teacher tokens",) * taught))
    return (Table(title="Cost of reaching a held-out accuracy", header=header, rows=rows, notes=notes),)


def _find_baselines(costs: Sequence[CostToThreshold]) -> dict[float, CostToThreshold]:
    return {one.threshold: one for one in reversed(costs) if one.name == costs[0].name and not one.is_best_held}


def compare_costs(
    costs: Sequence[CostToThreshold],
) -> list[tuple[CostToThreshold, tuple[float | None, float | None]]]:
    """Each cost with the ratios of the first curve's to it, by step and by tokens; None where one was not reached.

    The step of a best-held policy may be the scout's, which is no position of the branch.
    """
    baselines = _find_baselines(costs)

    def ratio(ours: int | None, theirs: int | None) -> float | None:
        return theirs / ours if ours and theirs else None

    found = []
    for one in costs:
        first = baselines.get(one.threshold)
        by_step = None if first is None or one.is_best_held else ratio(one.step, first.step)
        by_tokens = None if first is None else ratio(one.total_tokens, first.total_tokens)
        found.append((one, (by_step, by_tokens)))
    return found


BEST_HELD_NOTE = "best held: reached by any policy that the branch had paid for, its scout's included."
FORWARDS_NOTE = (
    "forwards: of sampling only, with those of the older model of an extrapolated guide; passes that score or train on "
    "whole responses are not counted."
)
TEACHER_NOTE = (
    "teacher tokens: response tokens that the teacher of a dense target read, in passes without gradient; no part of "
    "the tokens."
)
COST_AXIS_NAMES = {"seconds": "wall time", "forwards": "forwards"}


def _threshold_row(one: CostToThreshold, *, baseline: CostToThreshold | None, more: Sequence[str]) -> tuple[str, ...]:
    spent = _spent(one, more=more)
    before = _spent(baseline, more=more) if baseline else (None,) * len(spent)
    ratios = [f"{mine / ours:.2f}x" if mine and ours else "-" for mine, ours in zip(before, spent, strict=True)]
    if one.is_best_held:
        # Its policy may be the scout's, whose step is no position of this branch.
        ratios = ["-", *ratios[1:]]
    name = f"{one.name}, best held" if one.is_best_held else one.name
    return (name, format_number(one.threshold, digits=2), *(_cost_cell(cost) for cost in spent), *ratios)


def _spent(one: CostToThreshold, *, more: Sequence[str]) -> tuple[float | None, ...]:
    further = {"seconds": one.total_seconds, "forwards": one.total_forwards}
    return (one.step, one.total_steps, one.total_tokens, *(further[axis] for axis in more))


def _teacher_cell(one: CostToThreshold) -> str:
    return format_count(one.total_teacher_tokens or None)


def _cost_cell(cost: float | None) -> str:
    """Counts whole, seconds to a tenth."""
    return f"{cost:,.1f}" if isinstance(cost, float) else format_count(cost, absent="not reached")


def costs_tables(activities: Sequence[ActivityCost]) -> tuple[Table, ...]:
    """Everything executed, by kind of work."""
    columns = (
        *(text_column("work", "activity"), count_column("steps"), count_column("tokens")),
        *((count_column("teacher tokens", "teacher_tokens"),) * any(one.teacher_tokens for one in activities)),
        Column("seconds", lambda one: f"{one.seconds:,.1f}" if one.seconds else "-"),
    )
    return (build_table("Everything executed", activities, columns),)
