"""Small pictures that stand side by side: drawn once, then SVG in a page, or PNG and SVG on disk.

The same records give the same bytes: names in an SVG are hashed with a fixed salt, and no picture holds a date.
Letters are drawn as outlines, so that a picture looks alike wherever it is opened. Markup in labels means nothing.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.report.figures import COLOURS, DASHES, MARKERS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.4, 3.7
"""Inches."""
FIXED = {"svg.hashsalt": "npo", "svg.fonttype": "path", "text.parse_math": False, "axes.titlelocation": "left"}
NO_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One panel. `name` becomes a file name; `says` is what a reader who cannot see it is told."""

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
