"""Records to plots: the colors of all plots, figures of several panels in a file, and small plots for a report page.

The colors are Okabe and Ito's (readable for colorblind readers); lines also differ in dash and marker. matplotlib is
imported when a plot is made, and needs no display. The same records give the same bytes: names in an SVG are hashed
with a fixed salt, and no plot holds a date. Letters of small plots are drawn as outlines, without markup.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.storage.files import write_bytes_atomic
from npo_cli.types.costs import CurvePoint

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
AXIS_LABELS = {
    "step": "logical step (position in the data)",
    "updates": "optimizer updates, all costs",
    "tokens": "generated tokens, all costs",
    "forwards": "forward passes of sampling",
    "seconds": "wall clock (s)",
}
COST_AXES: tuple[tuple[str, CostGetter], ...] = (
    (AXIS_LABELS["step"], lambda point: point.step),
    ("training steps, all costs", lambda point: point.total_steps),
    (AXIS_LABELS["tokens"], lambda point: point.total_tokens),
)
SECONDS_AXIS: tuple[str, CostGetter] = (AXIS_LABELS["seconds"], lambda point: point.total_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class LineStyle:
    """How one branch, run or method is drawn, the same in every plot."""

    colour: str
    dash: str
    marker: str


def get_line_style(place: int) -> LineStyle:
    """The style of an index; colors, dashes and markers repeat."""
    return LineStyle(
        colour=COLOURS[place % len(COLOURS)], dash=DASHES[place % len(DASHES)], marker=MARKERS[place % len(MARKERS)]
    )


def plot_accuracy_curves(points: Sequence[CurvePoint], path: Path, title: str) -> None:
    """Held-out accuracy of every method by logical step, total steps, total tokens and, if all have them, seconds."""
    methods = list(dict.fromkeys(point.name for point in points))
    timed = {point.name for point in points if point.total_seconds > 0} == set(methods)
    axes = (*COST_AXES, SECONDS_AXIS) if timed else COST_AXES
    with open_figure(path, title=title, height=fit_height(4.6, len(methods), columns=METHOD_COLUMNS)) as figure:
        panels = figure.subplots(1, len(axes), sharey=True)
        for panel, (label, cost) in zip(panels, axes, strict=True):
            for place, method in enumerate(methods):
                own = sorted((one for one in points if one.name == method), key=cost)
                draw_line(panel, [(cost(one), one.accuracy) for one in own], name=method, index=place)
            label_cost_axis(panel, label, [point.accuracy for point in points])
        add_method_legend(figure, panels[0])


def draw_line(panel: "Axes", points: Sequence[tuple[float, float]], *, name: str, index: int) -> None:
    """(cost, accuracy) of the method with this index; at most `MAX_MARKERS` markers."""
    style = get_line_style(index)
    panel.plot(
        *zip(*points, strict=True),
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markevery=max(1, len(points) // MAX_MARKERS),
        markersize=4,
        linewidth=2,
        label=name,
        clip_on=False,
    )


def label_cost_axis(panel: "Axes", label: str, accuracies: Sequence[float]) -> None:
    """Accuracy, over the range of its values, against a cost from 0."""
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.set_ylim(fit_accuracies(accuracies))
    panel.xaxis.set_major_locator(make_tick_locator())
    panel.xaxis.set_major_formatter(lambda value, _: format_compact(value))


def add_method_legend(figure: "Figure", first: "Axes") -> None:
    """The y label at the left panel, and one legend below all."""
    first.set_ylabel("held-out accuracy")
    lines, names = first.get_legend_handles_labels()
    figure.legend(
        lines,
        names,
        loc="outside lower center",
        ncols=METHOD_COLUMNS,
        frameon=False,
        labelcolor="linecolor",
        handlelength=2.6,
    )


METHOD_COLUMNS = 4
"""Of the legend below a wide figure."""
MAX_CURVES = 8
"""More of them hide each other: intervals are not drawn, and the legend of a small plot is below it."""
LEGEND_ROW = 0.22
"""Inches."""


def fit_height(height: float, num_curves: int, *, columns: int) -> float:
    """The height of a plot, with room for the rows of a long legend below it."""
    return height + (LEGEND_ROW * -(-num_curves // columns) if num_curves > MAX_CURVES else 0.0)


NEAR_ZERO = 0.35
"""An axis begins at 0 where the smallest value is less than this share of the largest."""
AXIS_MARGIN = 0.06
"""Share of the range of values left empty at either end of an axis."""


MAX_ACCURACY_SHOWN = 1.02


def fit_accuracies(values: Sequence[float]) -> tuple[float, float]:
    """The same for accuracies, which end at 1."""
    low, high = fit_limits(values)
    return low, min(high, MAX_ACCURACY_SHOWN)


def fit_limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis for these values: their range with a margin, from 0 on where that is near."""
    low, high = min(values), max(values)
    margin = AXIS_MARGIN * (high - low) or 0.05 * abs(high) or 0.05
    if 0 <= low < NEAR_ZERO * high:
        return 0.0, high + AXIS_MARGIN * high
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def format_compact(value: float) -> str:
    """A tick label: 300, 20k, 1.5M."""
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.3g}{unit}"
    return f"{value:.3g}"


def make_tick_locator() -> "MaxNLocator":
    """At most six ticks, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


@contextlib.contextmanager
def open_figure(path: Path, *, title: str, height: float) -> Iterator["Figure"]:
    """A wide figure, saved whole when the block ends without an error; the suffix of the path is its format."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NpoError("plots need matplotlib, which is not installed", "pip install matplotlib") from error
    with matplotlib.rc_context(STYLE | SALT):
        figure = Figure(figsize=(13.0, height), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        if current_group().is_main:
            kind = path.suffix.lower().removeprefix(".")
            with io.BytesIO() as file:
                canvas.print_figure(file, format=kind, metadata=NO_DATE.get(kind))
                write_bytes_atomic(path, file.getvalue())


PANELS_PER_ROW = 2


def save_panels(plots: Sequence["Plot"], path: Path, *, title: str) -> None:
    """Several plots as the panels of one figure, two in a row; a wide plot alone."""
    columns = min(PANELS_PER_ROW, len(plots))
    rows = -(-len(plots) // columns)
    height = plots[0].height if len(plots) == 1 else 0.4 + max(plot.height for plot in plots) * rows
    with open_figure(path, title=title, height=max(height, 2.0)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for plot, panel in zip(plots, panels, strict=False):
            plot.draw(panel)
        for panel in panels[len(plots) :]:
            panel.set_axis_off()


WIDTH, HEIGHT = 6.4, 3.7
"""Inches."""
SALT = {"svg.hashsalt": "npo"}
FIXED = SALT | {"svg.fonttype": "path", "text.parse_math": False, "axes.titlelocation": "left"}
NO_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}, "pdf": {"CreationDate": None}}
"""Metadata that would make two pictures of the same records differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One panel. `name` becomes a file name; `alt_text` is its description for readers who cannot see it."""

    name: str
    alt_text: str
    draw: Callable[["Axes"], None]
    width: float = WIDTH
    height: float = HEIGHT


def render_svg(plot: Plot) -> bytes:
    """The plot as an SVG document."""
    return _render(plot, "svg")


DARK_COLOURS = {
    "#ffffff": "#1d232c",
    "#000000": "#e4e7ec",
    "#666666": "#a3acb9",
    "#e6e6e6": "#39414d",
    "#0072b2": "#4db1ef",
    "#d55e00": "#ff8f4d",
    "#009e73": "#35cfa0",
}
"""What colors become on a dark page; the others are readable on both."""
_COLOUR = re.compile(r"(fill|stroke): (#[0-9a-f]{6})")


def render_adaptive_svg(plot: Plot) -> bytes:
    """The plot as an SVG document that follows the reader's light or dark mode: its colors are CSS variables."""
    svg = _COLOUR.sub(_name_colour, render_svg(plot).decode("utf-8"))
    light, dark = (
        ";".join(f"--c{old[1:]}:{old if mode == 'light' else new}" for old, new in DARK_COLOURS.items())
        for mode in ("light", "dark")
    )
    # Letters have no fill of their own.
    style = f":root{{{light};fill:var(--c000000)}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    start = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:start]}<style>{style}</style>{svg[start:]}".encode()


def _name_colour(found: re.Match[str]) -> str:
    name, colour = found.groups()
    return f"{name}: var(--c{colour[1:]})" if colour in DARK_COLOURS else found.group(0)


def save_plot(plot: Plot, folder: Path) -> None:
    """NAME.png and NAME.svg in that folder."""
    for kind in ("png", "svg"):
        write_bytes_atomic(folder / f"{plot.name}.{kind}", _render(plot, kind))


def _render(plot: Plot, kind: str) -> bytes:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with _figure(plot) as figure:
        plot.draw(figure.subplots())
        with io.BytesIO() as file:
            if kind == "svg":
                # savefig draws a figure with a layout twice, to the same bytes.
                FigureCanvasSVG(figure).print_svg(file, metadata=NO_DATE[kind])
            else:
                figure.savefig(file, format=kind, metadata=NO_DATE[kind])
            return file.getvalue()


@contextlib.contextmanager
def _figure(plot: Plot) -> Iterator["Figure"]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | FIXED):
        yield Figure(figsize=(plot.width, plot.height), layout="constrained")
