"""Plot of AutoNPO: reward, entropy, and one band of transitions per sequence, on one x axis.

Labels of steps stand in the bands, as many as fit without overlap. Colours as in `plotting.py`.
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

REWARD, ENTROPY, ROLLBACK, RUNG, WARNING, TRIGGER, INK = (COLOURS[place] for place in (0, 2, 3, 4, 5, 1, 6))
COOLDOWN_COLOUR = "#e9e9e9"
FAILED_EVENT_LABELS = {
    "probe_rejected": "rejected",
    "prerequisite_missing": "prerequisite missing",
    "guide_empty": "no guide",
    "replay_rejected": "replay rejected",
    "limit_reached": "limit",
    "rung_refused": "refused",
}
"""Transitions that end an intervention without a lasting replay, and their labels in the band. `is_failed_end` says
which of them do: with a ladder another rung may follow."""
LETTER_WIDTH = 0.0054
"""Width of one character of a band's font, as a fraction of the axis."""
ARROW_HEIGHTS = (0.58, 0.42)
LABEL_HEIGHTS = (0.85, 0.15)
"""Heights in a band at which a label may stand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRange:
    """Steps from `first` to `last`."""

    first: float
    last: float


def plot_autonpo(
    readings: Sequence[TriggerReading],
    bands: Sequence[tuple[str, Sequence[Transition]]],
    path: Path,
    *,
    title: str,
) -> None:
    """Reward and entropy with their averages; below, one band for each named sequence of transitions.

    The marks in the two panels are those of the first band.
    """
    heights = [3.0, 3.0, *(1.0 for _ in bands)]
    with open_figure(path, title=title, height=6.0 + 0.9 * len(bands)) as figure:
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        named = (("reward", REWARD), ("entropy", ENTROPY))
        for panel, (name, colour) in zip(panels, named, strict=False):
            _draw_signal(panel, readings, name=name, colour=colour)
            _draw_marks(panel, bands[0][1])
        axis = _axis(readings)
        panels[0].set_xlim(axis.first, axis.last)
        for panel, (name, transitions) in zip(panels[2:], bands, strict=True):
            _draw_band(panel, transitions, name=name, axis=axis)
        panels[-1].set_xlabel("optimizer step")
        _legend(figure, [transition for _, transitions in bands for transition in transitions])


def _axis(readings: Sequence[TriggerReading]) -> StepRange:
    steps = [reading.step for reading in readings]
    margin = max(1.0, 0.015 * (max(steps) - min(steps)))
    return StepRange(first=min(steps) - margin, last=max(steps) + margin)


def _draw_signal(panel: "Axes", readings: Sequence[TriggerReading], *, name: str, colour: str) -> None:
    """Dots for the values, a line for the moving average."""
    for field, style in (
        (name, {"marker": "o", "ms": 3.2, "alpha": 0.4, "lw": 0, "mew": 0}),
        (f"{name}_ema", {"lw": 2.2}),
    ):
        points = [
            (reading.step, getattr(reading, field)) for reading in readings if getattr(reading, field) is not None
        ]
        panel.plot(*zip(*points, strict=True) if points else ([], []), color=colour, **style)
    panel.set_title(f"{name} per step, with its moving average", loc="left", color=colour)
    panel.margins(y=0.08)


def _draw_marks(panel: "Axes", transitions: Sequence[Transition]) -> None:
    for span in iter_cooldowns(transitions):
        panel.axvspan(span.first, span.last, color=COOLDOWN_COLOUR, lw=0, zorder=0)
    for transition in transitions:
        if transition.event == "trigger":
            panel.axvline(transition.step, color=TRIGGER, lw=1.6, zorder=1)
        if transition.event == "warning":
            panel.axvline(transition.step, color=WARNING, lw=1.6, ls=(0, (3, 2)), zorder=1)


def iter_cooldowns(transitions: Iterable[Transition]) -> Iterator[StepRange]:
    """Every cooldown, from the transition that starts it to its last step."""
    for transition in transitions:
        if (
            transition.state.phase == "COOLDOWN"
            and transition.phase_before != "COOLDOWN"
            and transition.state.until_step is not None
        ):
            yield StepRange(first=transition.step, last=max(transition.state.until_step, transition.step))


def is_failed_end(transition: Transition) -> bool:
    """Whether the intervention ended here without a lasting replay or window."""
    return transition.event in FAILED_EVENT_LABELS and (transition.is_rejection or transition.event == "limit_reached")


def iter_windows(transitions: Iterable[Transition]) -> Iterator[tuple[str, StepRange]]:
    """The window of every rung that was applied, with its name."""
    for transition in transitions:
        if transition.event == "rung_applied":
            evidence = transition.evidence
            yield evidence["rung"], StepRange(first=evidence["to_step"], last=evidence["until_step"])


def iter_rollbacks(transitions: Iterable[Transition]) -> Iterator[tuple[int, StepRange]]:
    """Of every rollback, the step before it and its target: one step, or all possible ones if it was assumed."""
    for transition in transitions:
        if transition.event == "rolled_back":
            steps = transition.evidence.get("to_steps") or [transition.state.step]
            yield transition.step, StepRange(first=min(steps), last=max(steps))


def _draw_band(panel: "Axes", transitions: Sequence[Transition], *, name: str, axis: StepRange) -> None:
    """Cooldowns and windows as areas, rollbacks as arrows, warnings and triggers as markers, and labels where they
    fit."""
    for span in iter_cooldowns(transitions):
        panel.axvspan(span.first, span.last, color=COOLDOWN_COLOUR, lw=0, zorder=0)
    for _, span in iter_windows(transitions):
        panel.axvspan(span.first, span.last, color=RUNG, alpha=0.35, lw=0, zorder=1)
    for number, (step, back) in enumerate(iter_rollbacks(transitions)):
        # A rollback may reach behind the one before it: the heights alternate.
        height = ARROW_HEIGHTS[number % len(ARROW_HEIGHTS)]
        arrow = {"arrowstyle": "-|>", "color": ROLLBACK, "lw": 2, "shrinkA": 0, "shrinkB": 0}
        panel.annotate("", xy=(back.last, height), xytext=(step, height), arrowprops=arrow)
        if back.first < back.last:
            panel.plot(
                [back.first, back.last], [height, height], color=ROLLBACK, lw=4, alpha=0.4, solid_capstyle="butt"
            )
    for events, marker, colour, size in (
        (("warning",), "v", WARNING, 7),
        (("trigger", "early_bootstrap"), "D", TRIGGER, 8),
        (("rung_applied",), "^", RUNG, 8),
        (tuple(FAILED_EVENT_LABELS), "x", INK, 7),
    ):
        steps = [
            transition.step
            for transition in transitions
            if transition.event in events and (marker != "x" or is_failed_end(transition))
        ]
        panel.plot(steps, [0.5] * len(steps), marker=marker, color=colour, ms=size, mew=1.8, lw=0, zorder=4)
    for at, height, text, side in place_labels(iter_step_labels(transitions), axis=axis):
        panel.text(at, height, text, ha=side, va="center", fontsize=9, zorder=5)
    panel.set_ylim(0, 1)
    panel.set_yticks([])
    panel.grid(False)
    panel.spines["left"].set_visible(False)
    panel.set_ylabel(name, rotation=0, ha="right", va="center")


def iter_step_labels(transitions: Sequence[Transition]) -> Iterator[tuple[float, str, int]]:
    """Step, label and priority: rollbacks and ends before warnings, no step twice."""
    labelled = {
        transition.step
        for transition in transitions
        if transition.event in ("rolled_back", "rung_applied") or is_failed_end(transition)
    }
    for transition in transitions:
        if transition.event == "rolled_back":
            (step, back) = next(iter_rollbacks([transition]))
            target = f"{back.first:.0f}-{back.last:.0f}" if back.first < back.last else f"{back.first:.0f}"
            yield step, f"{step} back to {target}", 0
        elif transition.event == "rung_applied":
            yield transition.step, f"{transition.step} {transition.evidence['rung']}", 0
        elif is_failed_end(transition):
            yield transition.step, f"{transition.step} {FAILED_EVENT_LABELS[transition.event]}", 1
        elif transition.event == "warning" and transition.step not in labelled:
            yield transition.step, f"{transition.step}", 2


def place_labels(
    labels: Iterable[tuple[float, str, int]], *, axis: StepRange
) -> Iterator[tuple[float, float, str, str]]:
    """Position, height, text and alignment of every label that fits, by priority; no two overlap.

    A label ends at its step; where the left edge leaves no room for that, it begins there.
    """
    taken: list[tuple[float, float, float]] = []
    for at, text, _ in sorted(labels, key=lambda label: label[2]):
        width = LETTER_WIDTH * (axis.last - axis.first) * (len(text) + 2)
        side = "right" if at - width >= axis.first else "left"
        start = at - width if side == "right" else at
        for height in LABEL_HEIGHTS:
            if not any(level == height and start < right and left < start + width for level, left, right in taken):
                taken.append((height, start, start + width))
                yield at, height, text, side
                break


def _legend(figure: "Figure", transitions: Sequence[Transition]) -> None:
    """A legend of the markers that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    events = {transition.event for transition in transitions}

    def marker_handle(marker: str, colour: str) -> Line2D:
        return Line2D([], [], marker=marker, color=colour, lw=0, ms=7, mew=1.8)

    entries = [
        ("warning", bool(events & {"warning"}), marker_handle("v", WARNING)),
        ("trigger", bool(events & {"trigger", "early_bootstrap"}), marker_handle("D", TRIGGER)),
        ("window of a rung", "rung_applied" in events, marker_handle("^", RUNG)),
        ("rollback", "rolled_back" in events, Line2D([], [], color=ROLLBACK, lw=2)),
        ("no lasting replay", any(map(is_failed_end, transitions)), marker_handle("x", INK)),
        ("cooldown", any(iter_cooldowns(transitions)), Patch(color=COOLDOWN_COLOUR)),
    ]
    shown = [(handle, name) for name, occurs, handle in entries if occurs]
    if shown:
        handles, names = zip(*shown, strict=True)
        figure.legend(handles, names, loc="outside lower center", ncols=len(shown), frameon=False)
