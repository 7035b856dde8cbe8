"""Mean curves of arms on each axis, each with the band of its interval. Colours and dashes as in `figures.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.compare_records import AXES, BandPoint
from npo_cli.report.figures import COLOURS, DASHES, MARKERS, compact, few_ticks, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "step": "logical step (place in the data)",
    "updates": "all optimiser updates",
    "tokens": "all tokens generated",
    "seconds": "wall clock (s)",
}
MOST_MARKED = 12


def arms_figure(points: Sequence[BandPoint], path: Path, title: str) -> None:
    """One panel an axis; an axis that is not known of every arm has none."""
    axes = [axis for axis in AXES if any(point.axis == axis for point in points)]
    arms = list(dict.fromkeys(point.arm for point in points))
    with page(path, title=title, height=4.6) as figure:
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, axis in zip(panels, axes, strict=True):
            for place, arm in enumerate(arms):
                _draw_arm(panel, [one for one in points if (one.arm, one.axis) == (arm, axis)], place=place)
            panel.set_xlabel(LABELS[axis])
            panel.set_xlim(left=0)
            panel.set_ylim(0, 1.02)
            panel.xaxis.set_major_locator(few_ticks())
            panel.xaxis.set_major_formatter(lambda value, _: compact(value))
        panels[0].set_ylabel("held-out accuracy")
        lines, names = panels[0].get_legend_handles_labels()
        figure.legend(
            lines, names, loc="outside lower center", ncols=4, frameon=False, labelcolor="linecolor", handlelength=2.6
        )


def _draw_arm(panel: "Axes", points: Sequence[BandPoint], *, place: int) -> None:
    colour = COLOURS[place % len(COLOURS)]
    costs = [one.cost for one in points]
    panel.plot(
        costs,
        [one.accuracy.value for one in points],
        color=colour,
        linestyle=DASHES[place % len(DASHES)],
        marker=MARKERS[place % len(MARKERS)],
        markevery=max(1, len(points) // MOST_MARKED),
        markersize=4,
        linewidth=2,
        label=points[0].arm,
        clip_on=False,
    )
    lows = [one.accuracy.value if one.accuracy.low is None else one.accuracy.low for one in points]
    highs = [one.accuracy.value if one.accuracy.high is None else one.accuracy.high for one in points]
    panel.fill_between(costs, lows, highs, color=colour, alpha=0.15, linewidth=0)
