"""Mean curves of arms on each axis, each with the band of its interval. Colours and dashes as in `figures.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.compare_records import AXES, CurveBandPoint
from npo_cli.report.figures import COLOURS, draw_line, add_method_legend, label_cost_axis, open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXIS_LABELS = {
    "step": "logical step (place in the data)",
    "updates": "all optimiser updates",
    "tokens": "all tokens generated",
    "forwards": "forward passes of sampling",
    "seconds": "wall clock (s)",
}


def plot_method_curves(points: Sequence[CurveBandPoint], path: Path, title: str) -> None:
    """One panel an axis; an axis that is not known of every arm has none."""
    axes = [axis for axis in AXES if any(point.axis == axis for point in points)]
    arms = list(dict.fromkeys(point.method for point in points))
    with open_figure(path, title=title, height=4.6) as figure:
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, axis in zip(panels, axes, strict=True):
            for place, arm in enumerate(arms):
                _draw_arm(panel, [one for one in points if (one.method, one.axis) == (arm, axis)], place=place)
            label_cost_axis(panel, AXIS_LABELS[axis])
        add_method_legend(figure, panels[0])


def _draw_arm(panel: "Axes", points: Sequence[CurveBandPoint], *, place: int) -> None:
    draw_line(panel, [(one.cost, one.accuracy.value) for one in points], name=points[0].method, index=place)
    lows = [one.accuracy.value if one.accuracy.low is None else one.accuracy.low for one in points]
    highs = [one.accuracy.value if one.accuracy.high is None else one.accuracy.high for one in points]
    colour = COLOURS[place % len(COLOURS)]
    panel.fill_between([one.cost for one in points], lows, highs, color=colour, alpha=0.15, linewidth=0)
