"""Picture of what AutoNPO saw and did: reward over entropy over a band for each course of events, one x axis.

Nothing is drawn twice in one place: names of steps stand in the bands, as many as fit. Colours as in `figures.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.report.plotting import COLOURS, open_figure
from npo_cli.types.autonpo import Transition, TriggerReading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD, ENTROPY, ROLLBACK, WARNING, TRIGGER, INK = (COLOURS[place] for place in (0, 2, 3, 5, 1, 6))
COOLDOWN_COLOUR = "#e9e9e9"
FAILED_EVENT_LABELS = {
    "rejected": "rejected",
    "missed": "missed",
    "unguided": "no guide",
    "reverted": "reverted",
    "capped": "cap",
}
"""Events after which nothing, or nothing more, came of a trigger, and how the band calls them."""
LETTER_WIDTH = 0.0054
"""Of one letter of a band's font, in widths of the axis."""
ARROW_HEIGHTS = (0.58, 0.42)
LABEL_HEIGHTS = (0.85, 0.15)
"""Heights in a band at which a name may stand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRange:
    """Steps from `first` to `last`."""

    first: float
    last: float


def plot_autonpo(
    readings: Sequence[TriggerReading],
    courses: Sequence[tuple[str, Sequence[Transition]]],
    path: Path,
    *,
    title: str,
) -> None:
    """Reward and entropy with their averages; below, a band for each named course (rehearsed, or what happened).

    The marks in the panels are those of the first course.
    """
    heights = [3.0, 3.0, *(1.0 for _ in courses)]
    with open_figure(path, title=title, height=6.0 + 0.9 * len(courses)) as figure:
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        named = (("reward", REWARD), ("entropy", ENTROPY))
        for panel, (name, colour) in zip(panels, named, strict=False):
            _draw_signal(panel, readings, name=name, colour=colour)
            _draw_marks(panel, courses[0][1])
        axis = _axis(readings)
        panels[0].set_xlim(axis.first, axis.last)
        for panel, (name, moves) in zip(panels[2:], courses, strict=True):
            _draw_band(panel, moves, name=name, axis=axis)
        panels[-1].set_xlabel("optimiser step")
        _legend(figure, [move for _, moves in courses for move in moves])


def _axis(readings: Sequence[TriggerReading]) -> StepRange:
    steps = [reading.step for reading in readings]
    margin = max(1.0, 0.015 * (max(steps) - min(steps)))
    return StepRange(first=min(steps) - margin, last=max(steps) + margin)


def _draw_signal(panel: "Axes", readings: Sequence[TriggerReading], *, name: str, colour: str) -> None:
    """Dots for what was measured, a line for its average."""
    for field, style in (
        (name, {"marker": "o", "ms": 3.2, "alpha": 0.4, "lw": 0, "mew": 0}),
        (f"{name}_ema", {"lw": 2.2}),
    ):
        seen = [(one.step, getattr(one, field)) for one in readings if getattr(one, field) is not None]
        panel.plot(*zip(*seen, strict=True) if seen else ([], []), color=colour, **style)
    panel.set_title(f"{name}: a dot a step, the line is the average", loc="left", color=colour)
    panel.margins(y=0.08)


def _draw_marks(panel: "Axes", moves: Sequence[Transition]) -> None:
    for span in iter_cooldowns(moves):
        panel.axvspan(span.first, span.last, color=COOLDOWN_COLOUR, lw=0, zorder=0)
    for move in moves:
        if move.event == "trigger":
            panel.axvline(move.step, color=TRIGGER, lw=1.6, zorder=1)
        if move.event == "warning":
            panel.axvline(move.step, color=WARNING, lw=1.6, ls=(0, (3, 2)), zorder=1)


def iter_cooldowns(moves: Iterable[Transition]) -> Iterator[StepRange]:
    """Every cooldown, from the move that began it to its last step."""
    for move in moves:
        if move.state.phase == "COOLDOWN" and move.phase_before != "COOLDOWN" and move.state.until_step is not None:
            yield StepRange(first=move.step, last=max(move.state.until_step, move.step))


def iter_rollbacks(moves: Iterable[Transition]) -> Iterator[tuple[int, StepRange]]:
    """Of every rollback, the step it left and the steps it went back to: one, or all that it could have."""
    for move in moves:
        if move.event == "rolled_back":
            steps = move.evidence.get("to_steps") or [move.state.step]
            yield move.step, StepRange(first=min(steps), last=max(steps))


def _draw_band(panel: "Axes", moves: Sequence[Transition], *, name: str, axis: StepRange) -> None:
    """Rests, rollbacks as arrows to the left, warnings and triggers as signs, and the steps that have room."""
    for span in iter_cooldowns(moves):
        panel.axvspan(span.first, span.last, color=COOLDOWN_COLOUR, lw=0, zorder=0)
    for number, (step, back) in enumerate(iter_rollbacks(moves)):
        # One may reach back behind the one before it: they take turns in height.
        height = ARROW_HEIGHTS[number % len(ARROW_HEIGHTS)]
        arrow = {"arrowstyle": "-|>", "color": ROLLBACK, "lw": 2, "shrinkA": 0, "shrinkB": 0}
        panel.annotate("", xy=(back.last, height), xytext=(step, height), arrowprops=arrow)
        if back.first < back.last:
            panel.plot(
                [back.first, back.last], [height, height], color=ROLLBACK, lw=4, alpha=0.4, solid_capstyle="butt"
            )
    for events, marker, colour, size in (
        (("warning",), "v", WARNING, 7),
        (("trigger", "early"), "D", TRIGGER, 8),
        (("pushed",), "^", ROLLBACK, 8),
        (tuple(FAILED_EVENT_LABELS), "x", INK, 7),
    ):
        steps = [move.step for move in moves if move.event in events]
        panel.plot(steps, [0.5] * len(steps), marker=marker, color=colour, ms=size, mew=1.8, lw=0, zorder=4)
    for at, height, text, side in place_labels(iter_step_labels(moves), within=axis):
        panel.text(at, height, text, ha=side, va="center", fontsize=9, zorder=5)
    panel.set_ylim(0, 1)
    panel.set_yticks([])
    panel.grid(False)
    panel.spines["left"].set_visible(False)
    panel.set_ylabel(name, rotation=0, ha="right", va="center")


def iter_step_labels(moves: Sequence[Transition]) -> Iterator[tuple[float, str, int]]:
    """Where a name belongs, the name, and its rank: rollbacks and ends before warnings, no step twice."""
    answered = {move.step for move in moves if move.event == "rolled_back" or move.event in FAILED_EVENT_LABELS}
    for move in moves:
        if move.event == "rolled_back":
            (step, back) = next(iter_rollbacks([move]))
            reach = f"{back.first:.0f}-{back.last:.0f}" if back.first < back.last else f"{back.first:.0f}"
            yield step, f"{step} back to {reach}", 0
        elif move.event in FAILED_EVENT_LABELS:
            yield move.step, f"{move.step} {FAILED_EVENT_LABELS[move.event]}", 1
        elif move.event == "warning" and move.step not in answered:
            yield move.step, f"{move.step}", 2


def place_labels(
    names: Iterable[tuple[float, str, int]], *, within: StepRange
) -> Iterator[tuple[float, float, str, str]]:
    """Place, height, text and alignment of every name that has room, important ones first: none covers another.

    A name ends at its step; where the left edge leaves no room for that, it begins there.
    """
    taken: list[tuple[float, float, float]] = []
    for at, text, _ in sorted(names, key=lambda named: named[2]):
        long = LETTER_WIDTH * (within.last - within.first) * (len(text) + 2)
        side = "right" if at - long >= within.first else "left"
        start = at - long if side == "right" else at
        for height in LABEL_HEIGHTS:
            if not any(level == height and start < right and left < start + long for level, left, right in taken):
                taken.append((height, start, start + long))
                yield at, height, text, side
                break


def _legend(figure: "Figure", moves: Sequence[Transition]) -> None:
    """A key to the signs that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    happened = {move.event for move in moves}

    def sign(marker: str, colour: str) -> Line2D:
        return Line2D([], [], marker=marker, color=colour, lw=0, ms=7, mew=1.8)

    key = [
        ("warning", bool(happened & {"warning"}), sign("v", WARNING)),
        ("trigger", bool(happened & {"trigger", "early"}), sign("D", TRIGGER)),
        ("pushed ahead", "pushed" in happened, sign("^", ROLLBACK)),
        ("rollback", "rolled_back" in happened, Line2D([], [], color=ROLLBACK, lw=2)),
        ("nothing came of it", bool(happened & set(FAILED_EVENT_LABELS)), sign("x", INK)),
        ("rest", any(iter_cooldowns(moves)), Patch(color=COOLDOWN_COLOUR)),
    ]
    shown = [(handle, name) for name, there, handle in key if there]
    if shown:
        handles, names = zip(*shown, strict=True)
        figure.legend(handles, names, loc="outside lower center", ncols=len(shown), frameon=False)
