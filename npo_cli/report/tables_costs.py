"""What a run cost as tables of text: at each held-out accuracy it reached, and by kind of work."""

from collections.abc import Sequence

from npo_cli.report.table import Table, format_count, format_number
from npo_cli.types.costs import ActivityCost, CostToThreshold


def cost_to_threshold_tables(crossings: Sequence[CostToThreshold]) -> tuple[Table, ...]:
    """What every arm had spent at each threshold, and its speed next to the first arm's on every axis.

    The wall clock is an axis where it is known, forward passes where they are more than tokens.
    """
    timed = any(one.total_seconds for one in crossings)
    twice = any((one.total_forwards or 0) > (one.total_tokens or 0) for one in crossings)
    more = ("seconds",) * timed + ("forwards",) * twice
    totals = ("step", "total steps", "total tokens", *(f"total {axis}" for axis in more))
    ratios = ("by step", "by total steps", "by total tokens", *(f"by {COST_AXIS_NAMES[axis]}" for axis in more))
    baselines = {one.threshold: one for one in reversed(crossings) if one.name == crossings[0].name}
    rows = tuple(_crossing_row(one, baseline=baselines.get(one.threshold), more=more) for one in crossings)
    notes = (
        f"by ...: cost of {crossings[0].name} divided by cost of the arm; above 1 the arm is faster.",
        "total: scout and rolled-back steps, scoring, probes and the guide's samples are counted.",
        *((FORWARDS_NOTE,) * twice),
    )
    header = ("arm", "accuracy", *totals, *ratios)
    return (Table(title="Cost of reaching a held-out accuracy", header=header, rows=rows, notes=notes),)


FORWARDS_NOTE = (
    "forwards: of sampling alone, with those of the older copy on an extrapolated guide's tokens; passes that score or "
    "train on whole responses are not counted."
)
COST_AXIS_NAMES = {"seconds": "wall time", "forwards": "forwards"}


def _crossing_row(one: CostToThreshold, *, baseline: CostToThreshold | None, more: Sequence[str]) -> tuple[str, ...]:
    spent = _spent(one, more=more)
    before = _spent(baseline, more=more) if baseline else (None,) * len(spent)
    ratios = (f"{mine / ours:.2f}x" if mine and ours else "-" for mine, ours in zip(before, spent, strict=True))
    return (one.name, format_number(one.threshold, digits=2), *(_cost_cell(cost) for cost in spent), *ratios)


def _spent(one: CostToThreshold, *, more: Sequence[str]) -> tuple[float | None, ...]:
    further = {"seconds": one.total_seconds, "forwards": one.total_forwards}
    return (one.step, one.total_steps, one.total_tokens, *(further[axis] for axis in more))


def _cost_cell(cost: float | None) -> str:
    """Counts whole, seconds to a tenth."""
    return f"{cost:,.1f}" if isinstance(cost, float) else format_count(cost, absent="not reached")


def costs_tables(lines: Sequence[ActivityCost]) -> tuple[Table, ...]:
    """Everything executed by kind of work."""
    rows = tuple(
        (one.activity, format_count(one.steps), format_count(one.tokens), f"{one.seconds:,.1f}" if one.seconds else "-")
        for one in lines
    )
    return (Table(title="Everything executed", header=("work", "steps", "tokens", "seconds"), rows=rows),)
