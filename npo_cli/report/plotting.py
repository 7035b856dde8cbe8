"""Records to plots. One colour per method in every panel, labels beside the lines.

The colours are Okabe and Ito's (readable for colour-blind readers); lines also differ in dash and marker. matplotlib is
imported when a plot is made, and needs no display.

Estimates with their intervals along distances, the chosen one ringed. A figure that is no number is left out.

Small pictures that stand side by side: drawn once, then SVG in a page, or PNG and SVG on disk.

The same records give the same bytes: names in an SVG are hashed with a fixed salt, and no picture holds a date.
Letters are drawn as outlines, so that a picture looks alike wherever it is opened. Markup in labels means nothing.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.types.costs import CurvePoint
from npo_cli.types.scores import CandidateScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SCALE_RATIO = 20
"""From this ratio of the largest to the smallest value on, a logarithmic scale may be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalEstimate:
    """One estimate."""

    distance: int
    value: float
    low: float
    high: float
    selected_label: str | None = None
    """Label of the ring of the selected one; None for the others."""


def collect_estimates(scores: Sequence[CandidateScore], name: str) -> list[IntervalEstimate]:
    """One of the fields quality, variance and signal of every candidate."""
    return [
        IntervalEstimate(
            distance=one.distance,
            value=getattr(one, name),
            low=getattr(one, f"{name}_low"),
            high=getattr(one, f"{name}_high"),
            selected_label=one.candidate if one.is_selected else None,
        )
        for one in scores
        if getattr(one, name) is not None
    ]


def draw_intervals(
    panel: "Axes", estimates: Sequence[IntervalEstimate], *, colour: str, allow_log: bool, muted_colour: str
) -> None:
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


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^Dv<>"
MAX_MARKERS = 12
MUTED = "#666666"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "figure.dpi": 150,
}
CostGetter = Callable[[CurvePoint], float]
COST_AXES: tuple[tuple[str, CostGetter], ...] = (
    ("logical step (place in the data)", lambda point: point.step),
    ("all optimiser steps paid for", lambda point: point.total_steps),
    ("all tokens generated", lambda point: point.total_tokens),
)
SECONDS_AXIS: tuple[str, CostGetter] = ("wall clock (s)", lambda point: point.total_seconds)


def plot_accuracy_curves(points: Sequence[CurvePoint], path: Path, title: str) -> None:
    """Held-out accuracy of every method against its logical step, its total steps, its total tokens and the clock.

    The clock has a panel only where it is known of every method.
    """
    methods = list(dict.fromkeys(point.name for point in points))
    timed = {point.name for point in points if point.total_seconds > 0} == set(methods)
    axes = (*COST_AXES, SECONDS_AXIS) if timed else COST_AXES
    with open_figure(path, title=title, height=4.6) as figure:
        panels = figure.subplots(1, len(axes), sharey=True)
        for panel, (label, cost) in zip(panels, axes, strict=True):
            for place, method in enumerate(methods):
                own = sorted((one for one in points if one.name == method), key=cost)
                draw_line(panel, [(cost(one), one.accuracy) for one in own], name=method, index=place)
            label_cost_axis(panel, label)
        add_method_legend(figure, panels[0])


def draw_line(panel: "Axes", points: Sequence[tuple[float, float]], *, name: str, index: int) -> None:
    """The (cost, accuracy) of the n-th method; a long line has a mark only here and there."""
    panel.plot(
        *zip(*points, strict=True),
        color=COLOURS[index % len(COLOURS)],
        linestyle=DASHES[index % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)],
        markevery=max(1, len(points) // MAX_MARKERS),
        markersize=4,
        linewidth=2,
        label=name,
        clip_on=False,
    )


def label_cost_axis(panel: "Axes", label: str) -> None:
    """Accuracy from 0 to 1 against a cost from 0."""
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.set_ylim(0, 1.02)
    panel.xaxis.set_major_locator(make_tick_locator())
    panel.xaxis.set_major_formatter(lambda value, _: format_compact(value))


def add_method_legend(figure: "Figure", first: "Axes") -> None:
    """What the panels share: the left one's scale, and one legend below."""
    first.set_ylabel("held-out accuracy")
    lines, names = first.get_legend_handles_labels()
    figure.legend(
        lines, names, loc="outside lower center", ncols=4, frameon=False, labelcolor="linecolor", handlelength=2.6
    )


def format_compact(value: float) -> str:
    """A count as an axis says it: 300, 20k, 1.5M."""
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.3g}{unit}"
    return f"{value:.3g}"


def make_tick_locator() -> "MaxNLocator":
    """At most six, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


@contextlib.contextmanager
def open_figure(path: Path, *, title: str, height: float) -> Iterator["Figure"]:
    """A wide figure in the house style, saved when the block ends well; the format is the file's ending."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NpoError("pictures need matplotlib, which is not installed", "pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.0, height), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        if current_group().is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            canvas.print_figure(path)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.4, 3.7
"""Inches."""
FIXED = {"svg.hashsalt": "npo", "svg.fonttype": "path", "text.parse_math": False, "axes.titlelocation": "left"}
NO_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One panel. `name` becomes a file name; `alt_text` is its description for readers who cannot see it."""

    name: str
    alt_text: str
    draw: Callable[["Axes"], None]
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True, kw_only=True, slots=True)
class LineStyle:
    """How one branch or run is drawn, the same in every picture."""

    colour: str
    dash: str
    marker: str


def get_line_style(place: int) -> LineStyle:
    """Of the n-th of them; after the last colour the first comes again."""
    return LineStyle(
        colour=COLOURS[place % len(COLOURS)], dash=DASHES[place % len(DASHES)], marker=MARKERS[place % len(MARKERS)]
    )


def render_svg(picture: Plot) -> bytes:
    """The picture as a document of its own."""
    return _drawn(picture, "svg")


def save_plot(picture: Plot, folder: Path) -> None:
    """NAME.png and NAME.svg in that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        (folder / f"{picture.name}.{kind}").write_bytes(_drawn(picture, kind))


def _drawn(picture: Plot, kind: str) -> bytes:
    with _figure(picture) as figure:
        picture.draw(figure.subplots())
        with io.BytesIO() as file:
            figure.savefig(file, format=kind, metadata=NO_DATE[kind])
            return file.getvalue()


@contextlib.contextmanager
def _figure(picture: Plot) -> Iterator["Figure"]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | FIXED):
        yield Figure(figsize=(picture.width, picture.height), layout="constrained")
