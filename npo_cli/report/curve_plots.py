"""Curves: held-out accuracy of a run over each kind of cost, its training metrics, and mean curves of methods.

A diamond marks where a branch was forked; the wide band behind a line marks the steps with a guide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.report.plotting import (
    AXIS_LABELS,
    COST_AXES,
    HEIGHT,
    MAX_CURVES,
    METHOD_COLUMNS,
    MUTED,
    SECONDS_AXIS,
    CostGetter,
    LineStyle,
    Plot,
    add_method_legend,
    draw_line,
    fit_accuracies,
    fit_height,
    fit_limits,
    format_compact,
    get_line_style,
    label_cost_axis,
    open_figure,
)
from npo_cli.types.comparison import AXES, CurveBandPoint
from npo_cli.types.costs import CurvePoint
from npo_cli.types.rollouts import StepReport
from npo_cli.types.views import BranchSpan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING_WINDOW = 9
"""Steps of the moving average of a training metric."""
MAX_MARKED_POINTS = 60
"""Markers of one curve: each is an element of the picture."""
LEGEND_COLUMNS = 2
BELOW_AXIS = 0.55
"""Inches between the axis and a legend below it: tick labels and the axis label."""
AXIS_NAMES = ("step", "total-steps", "tokens", "clock")
PLOTTED_METRICS = (
    ("reward", "mean reward of a batch", "training reward"),
    ("entropy", "mean entropy per token (nats)", "policy entropy"),
    ("inject/slots", "groups with a guide response", "injected guides"),
    ("inject/grad_norm_fraction", "guide's share of the gradient", "guide's share of the gradient"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One curve of held-out accuracy, from the point at which it became a method of its own."""

    index: int
    """Decides its colour, dash and marker."""
    points: tuple[CurvePoint, ...]
    guide_until: int | None
    is_fork: bool
    """Whether its first point is that of a rollback."""


def make_accuracy_plots(methods: Sequence[Curve], *, prefix: str) -> Iterator[Plot]:
    """Held-out accuracy against logical step, all steps, all tokens and, where it is known of all, the clock."""
    # At a standstill at step 0 nothing was spent, known or not.
    clocks = [point.total_seconds > 0 for method in methods for point in method.points if point.total_steps]
    timed = bool(clocks) and all(clocks)
    axes = (*COST_AXES, SECONDS_AXIS) if timed else COST_AXES
    for name, (label, cost) in zip(AXIS_NAMES, axes, strict=False):
        yield Plot(
            name=f"{prefix}accuracy-by-{name}",
            alt_text=f"held-out accuracy against {label}: {_ends(methods)}",
            draw=partial(_draw_accuracy, methods=methods, cost=cost, label=label),
            height=fit_height(HEIGHT, len(methods), columns=LEGEND_COLUMNS),
        )


def _ends(methods: Sequence[Curve]) -> str:
    return ", ".join(f"{method.points[0].name} ends at {method.points[-1].accuracy:.3f}" for method in methods)


def _draw_accuracy(panel: "Axes", *, methods: Sequence[Curve], cost: CostGetter, label: str) -> None:
    for method in methods:
        style, points = get_line_style(method.index), method.points
        if method.guide_until is not None:
            _draw_guided(panel, points, cost=cost, until=method.guide_until, colour=style.colour)
        panel.plot(
            [cost(point) for point in points],
            [point.accuracy for point in points],
            **{"color": style.colour, "ls": style.dash, "lw": 2, "clip_on": False, "label": points[0].name},
            **{"marker": style.marker, "ms": 3.5, "markevery": -(-len(points) // MAX_MARKED_POINTS)},
        )
        if method.is_fork:
            _draw_fork(panel, (cost(points[0]), points[0].accuracy), style)
    panel.set_title("held-out accuracy")
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.set_ylim(fit_accuracies([point.accuracy for method in methods for point in method.points]))
    _finish(panel)


def _draw_guided(panel: "Axes", points: Sequence[CurvePoint], *, cost: CostGetter, until: int, colour: str) -> None:
    """A band behind the line up to step `until`, between evaluations by straight interpolation."""
    import numpy as np

    steps = [point.step for point in points]
    inside = [*(step for step in steps if step <= until), min(until, steps[-1])]
    costs = np.interp(inside, steps, [cost(point) for point in points])
    accuracies = np.interp(inside, steps, [point.accuracy for point in points])
    panel.plot(costs, accuracies, color=colour, lw=9, alpha=0.22, solid_capstyle="butt", zorder=1)


def _draw_fork(panel: "Axes", at: tuple[float, float], style: LineStyle) -> None:
    panel.plot(*at, marker="D", ms=8, color="white", mec=style.colour, mew=2, zorder=5, clip_on=False)


def make_training_plots(reports: Sequence[StepReport], limbs: Sequence[BranchSpan], *, prefix: str) -> Iterator[Plot]:
    """One picture for each measure that any step has; a constant zero is not drawn."""
    for name, label, title in PLOTTED_METRICS:
        if any(report.metrics.get(name) for report in reports):
            yield Plot(
                name=f"{prefix}{title.replace(' ', '-').replace(chr(39), '')}",
                alt_text=f"{title} by step, one line per branch",
                draw=partial(_draw_measure, reports=reports, limbs=limbs, name=name, label=label, title=title),
                height=fit_height(HEIGHT, len(limbs), columns=LEGEND_COLUMNS),
            )


def _draw_measure(
    panel: "Axes", *, reports: Sequence[StepReport], limbs: Sequence[BranchSpan], name: str, label: str, title: str
) -> None:
    for place, limb in enumerate(limbs):
        style = get_line_style(place)
        seen = [(one.step, one.metrics[name]) for one in reports if one.branch == limb.branch and name in one.metrics]
        if not seen:
            continue
        steps, values = zip(*seen, strict=True)
        if limb.guide_until is not None:
            panel.axvspan(limb.fork_step, min(limb.guide_until, limb.last_step), color=style.colour, alpha=0.1, lw=0)
        if limb.parent is not None:
            panel.axvline(limb.fork_step, color=style.colour, lw=1, ls=(0, (2, 2)))
        panel.plot(steps, values, color=style.colour, lw=0.8, alpha=0.35)
        panel.plot(steps, moving_mean(values), color=style.colour, ls=style.dash, lw=2, label=limb.branch)
    panel.set_title(title)
    panel.set_xlabel("training step")
    panel.set_ylabel(label)
    panel.set_xlim(left=0)
    measured = [one.metrics[name] for one in reports if name in one.metrics]
    panel.set_ylim(fit_limits(measured))
    _finish(panel)


def moving_mean(values: Sequence[float]) -> list[float]:
    """The mean over `SMOOTHING_WINDOW` values around each, fewer near the ends."""
    half = SMOOTHING_WINDOW // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _finish(panel: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(lambda value, _: format_compact(value))
    num_curves = len(panel.get_legend_handles_labels()[0])
    style = {"frameon": False, "labelcolor": MUTED, "handlelength": 2.6, "fontsize": 9}
    if num_curves > MAX_CURVES:
        below = panel.transAxes + ScaledTranslation(0, -BELOW_AXIS, panel.figure.dpi_scale_trans)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
        panel.legend(ncols=LEGEND_COLUMNS, **place, **style)
    elif num_curves > 1:
        panel.legend(**style)


def plot_method_curves(points: Sequence[CurveBandPoint], path: Path, title: str) -> None:
    """One panel per cost axis that every method has, with mean curves and their intervals."""
    axes = [axis for axis in AXES if any(point.axis == axis for point in points)]
    methods = list(dict.fromkeys(point.method for point in points))
    bounds = list_bounds(points, with_bands=len(methods) <= MAX_CURVES)
    with open_figure(path, title=title, height=fit_height(4.6, len(methods), columns=METHOD_COLUMNS)) as figure:
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, axis in zip(panels, axes, strict=True):
            for place, method in enumerate(methods):
                own = [one for one in points if (one.method, one.axis) == (method, axis)]
                _draw_method(panel, own, place=place, with_band=len(methods) <= MAX_CURVES)
            label_cost_axis(panel, AXIS_LABELS[axis], bounds)
        add_method_legend(figure, panels[0])


def make_method_plots(points: Sequence[CurveBandPoint], *, prefix: str) -> Iterator[Plot]:
    """Mean curves of methods with their intervals, one plot per cost axis."""
    methods = list(dict.fromkeys(point.method for point in points))
    for axis in AXES:
        own = [point for point in points if point.axis == axis]
        if own:
            ends = ", ".join(
                f"{name} ends at {[one for one in own if one.method == name][-1].accuracy.value:.3f}"
                for name in methods
                if any(one.method == name for one in own)
            )
            yield Plot(
                name=f"{prefix}by-{axis}",
                alt_text=f"mean held-out accuracy against {AXIS_LABELS[axis]}: {ends}",
                draw=partial(_draw_methods, points=own, methods=methods, label=AXIS_LABELS[axis]),
                height=fit_height(HEIGHT, len(methods), columns=LEGEND_COLUMNS),
            )


def _draw_methods(panel: "Axes", *, points: Sequence[CurveBandPoint], methods: Sequence[str], label: str) -> None:
    for place, method in enumerate(methods):
        own = [one for one in points if one.method == method]
        if own:
            _draw_method(panel, own, place=place, with_band=len(methods) <= MAX_CURVES)
    panel.set_title("held-out accuracy, mean over seeds")
    label_cost_axis(panel, label, list_bounds(points, with_bands=len(methods) <= MAX_CURVES))
    _finish(panel)


def list_bounds(points: Sequence[CurveBandPoint], *, with_bands: bool) -> list[float]:
    """Every value, and every end of an interval where they are drawn."""
    if not with_bands:
        return [one.accuracy.value for one in points]
    bounds = (bound for one in points for bound in (one.accuracy.value, one.accuracy.low, one.accuracy.high))
    return [bound for bound in bounds if bound is not None]


def _draw_method(panel: "Axes", points: Sequence[CurveBandPoint], *, place: int, with_band: bool) -> None:
    draw_line(panel, [(one.cost, one.accuracy.value) for one in points], name=points[0].method, index=place)
    if not with_band:
        return
    lows = [one.accuracy.value if one.accuracy.low is None else one.accuracy.low for one in points]
    highs = [one.accuracy.value if one.accuracy.high is None else one.accuracy.high for one in points]
    colour = get_line_style(place).colour
    panel.fill_between([one.cost for one in points], lows, highs, color=colour, alpha=0.15, linewidth=0)
