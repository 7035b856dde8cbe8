"""Estimates with their intervals along distances, the chosen one ringed. A figure that is no number is left out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npo_cli.records import CheckpointScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SCALE_RATIO = 20
"""From this ratio of the largest to the smallest value on, a scale of ratios may be asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalEstimate:
    """One estimate."""

    distance: int
    value: float
    low: float
    high: float
    selected_label: str | None = None
    """What stands at the ring; None where it was not chosen."""


def collect_estimates(scores: Sequence[CheckpointScore], name: str) -> list[IntervalEstimate]:
    """One of the fields quality, variance and signal of every candidate."""
    return [
        IntervalEstimate(
            distance=one.distance,
            value=getattr(one, name),
            low=getattr(one, f"{name}_low"),
            high=getattr(one, f"{name}_high"),
            selected_label=f"step {one.step}" if one.is_selected else None,
        )
        for one in scores
    ]


def draw_intervals(panel: "Axes", estimates: Sequence[IntervalEstimate], *, colour: str, allow_log: bool, muted_colour: str) -> None:
    """A line with bars; in the colour `quiet` a word where nothing could be estimated."""
    known = [one for one in estimates if all(map(math.isfinite, (one.value, one.low, one.high)))]
    if not known:
        panel.text(0.5, 0.5, "could not be estimated", transform=panel.transAxes, ha="center", color=muted_colour)
        return
    distances, values, lows = zip(*((one.distance, one.value, one.low) for one in known), strict=True)
    # A resampled interval may leave its own estimate outside; a bar cannot reach backwards.
    bars = [[max(0.0, one.value - one.low) for one in known], [max(0.0, one.high - one.value) for one in known]]
    panel.errorbar(distances, values, yerr=bars, color=colour, ecolor=f"{colour}88", fmt="o-", lw=2, ms=5, capsize=3)
    for one in known:
        if one.selected_label is not None:
            panel.plot([one.distance], [one.value], marker="o", ms=14, color=colour, fillstyle="none", mew=2)
            # To the side that has room.
            side, ha = (12, "left") if one.distance < max(distances) / 2 else (-12, "right")
            at = (one.distance, one.value)
            panel.annotate(one.selected_label, at, xytext=(side, 9), textcoords="offset points", ha=ha)
    # V may span orders of magnitude: then ratios are what the eye should compare.
    if allow_log and min(*values, *lows) > 0 and max(values) > LOG_SCALE_RATIO * min(values):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=min(0.0, *lows))
    panel.set_xlim(0, 1.05 * max(distances))
    panel.xaxis.get_major_locator().set_params(integer=True)
