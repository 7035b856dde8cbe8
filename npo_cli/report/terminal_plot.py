"""Curves in a terminal: braille dots, 2 by 4 per character. The caller has the colors of the curves."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

LABEL_WIDTH = 8
"""Of the numbers left of the axis."""
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the braille character at (row, column) within a cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a plot."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), x ascending."""


Span = tuple[str, int | None]
"""Text, and the number of the curve that it belongs to (None: of the frame)."""
Line = tuple[Span, ...]


def draw_curves(
    title: str, curves: Sequence[Curve], *, width: int, height: int, across: tuple[float, float]
) -> list[Line]:
    """A heading with the newest value of each curve, `height` lines of dots, and the ends of the x axis.

    `across` is the range of x; that of y is the range of the finite points. Where there is none, the lines stay empty
    and the heading says so.
    """
    drawn = [
        Curve(name=curve.name, points=[point for point in curve.points if all(map(math.isfinite, point))])
        for curve in curves
    ]
    points = [point for curve in drawn for point in curve.points]
    if not points:
        return [((title, None), ("  nothing yet", None)), *[((" " * LABEL_WIDTH, None),)] * (height + 1)]
    (left, right), (low, high) = _widen(across), _widen([y for _, y in points])
    columns = max(1, width - LABEL_WIDTH - 1)
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for number, curve in enumerate(drawn):
        for x, y in _dots(curve.points, (left, right), (low, high), size=(2 * columns, 4 * height)):
            bits, _ = cells.get((y // 4, x // 2), (0, 0))
            cells[y // 4, x // 2] = (bits | DOTS[y % 4][x % 2], number)
    labels = {0: f"{high:.3f}", height - 1: f"{low:.3f}"}
    rows = [
        (
            (f"{labels.get(row, ''):>{LABEL_WIDTH - 1}} \N{BOX DRAWINGS LIGHT VERTICAL}", None),
            *_merge(_cell(cells.get((row, column))) for column in range(columns)),
        )
        for row in range(height)
    ]
    first, last = f"step {left:g}", f"{right:g}"
    axis = f"{'':{LABEL_WIDTH}} {first}{last:>{max(len(last) + 1, columns - len(first))}}"
    return [_heading(title, drawn, width=width), *rows, ((axis[:width], None),)]


def _heading(title: str, curves: Sequence[Curve], *, width: int) -> Line:
    """`reward  main 0.542  late 0.611`: as many as fit."""
    spans: list[Span] = [(title, None)]
    left = width - len(title)
    for number, curve in enumerate(curves):
        text = f"  {curve.name} {curve.points[-1][1]:.3f}" if curve.points else ""
        if len(text) > left:
            break
        left -= len(text)
        spans.append((text, number))
    return tuple(spans)


def _widen(values: Iterable[float]) -> tuple[float, float]:
    """The range of the values; one value has a range around it."""
    every = list(values)
    low, high = min(every), max(every)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _dots(
    points: Sequence[tuple[float, float]],
    across: tuple[float, float],
    up: tuple[float, float],
    *,
    size: tuple[int, int],
) -> Iterable[tuple[int, int]]:
    """Dots of the straight lines between neighbors, from the top left corner."""
    placed = [
        (
            round((x - across[0]) / (across[1] - across[0]) * (size[0] - 1)),
            round((up[1] - y) / (up[1] - up[0]) * (size[1] - 1)),
        )
        for x, y in points
    ]
    yield from placed[:1]
    for (x0, y0), (x1, y1) in pairwise(placed):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(1, steps + 1):
            yield round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)


def _cell(found: tuple[int, int] | None) -> Span:
    return (" ", None) if found is None else (chr(0x2800 + found[0]), found[1])


def _merge(spans: Iterable[Span]) -> Iterable[Span]:
    """Neighbors of one curve as one text."""
    text, owner = "", None
    for part, number in spans:
        if text and number != owner:
            yield text, owner
            text = ""
        text, owner = text + part, number
    if text:
        yield text, owner
