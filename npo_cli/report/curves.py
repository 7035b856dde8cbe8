"""Curves of a run: held-out accuracy over each kind of cost, and what training measured step by step.

A diamond marks where a branch left its parent; the broad band behind a line lasts as long as a guide was mixed in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from npo_cli.costs import CurvePoint
from npo_cli.records import StepReport
from npo_cli.report.figures import CLOCK, PANELS, QUIET, Cost, compact
from npo_cli.report.limbs import Limb
from npo_cli.report.pictures import Look, Picture, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 9
"""Steps in the moving average of what is measured once a step."""
NAMES = ("step", "total-steps", "tokens", "clock")
MEASURES = (
    ("reward", "mean reward of a batch", "training reward"),
    ("entropy", "mean entropy of a token (nats)", "policy entropy"),
    ("inject/slots", "groups with a guide in a slot", "guides seated"),
    ("inject/grad_share", "guide's share of the gradient", "guide's share of the gradient"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One curve of held-out accuracy, from the point at which it became an arm of its own."""

    place: int
    """Decides its colour, dash and marker."""
    points: tuple[CurvePoint, ...]
    guide_until: int | None
    is_fork: bool
    """Whether its first point is that of a rollback."""


def accuracy_pictures(arms: Sequence[Arm], *, prefix: str) -> Iterator[Picture]:
    """Held-out accuracy against logical step, all steps, all tokens and, where it is known of all, the clock."""
    # At a standstill at step 0 nothing was spent, known or not.
    clocks = [point.total_seconds > 0 for arm in arms for point in arm.points if point.total_steps]
    timed = bool(clocks) and all(clocks)
    axes = (*PANELS, CLOCK) if timed else PANELS
    for name, (label, cost) in zip(NAMES, axes, strict=False):
        yield Picture(
            name=f"{prefix}accuracy-by-{name}",
            says=f"held-out accuracy against {label}: {_ends(arms)}",
            draw=partial(_draw_accuracy, arms=arms, cost=cost, label=label),
        )


def _ends(arms: Sequence[Arm]) -> str:
    return ", ".join(f"{arm.points[0].arm} ends at {arm.points[-1].accuracy:.3f}" for arm in arms)


def _draw_accuracy(panel: "Axes", *, arms: Sequence[Arm], cost: Cost, label: str) -> None:
    for arm in arms:
        style, points = look(arm.place), arm.points
        if arm.guide_until is not None:
            _draw_guided(panel, points, cost=cost, until=arm.guide_until, colour=style.colour)
        panel.plot(
            [cost(point) for point in points],
            [point.accuracy for point in points],
            **{"color": style.colour, "ls": style.dash, "lw": 2, "clip_on": False, "label": points[0].arm},
            **{"marker": style.marker, "ms": 3.5},
        )
        if arm.is_fork:
            _draw_fork(panel, (cost(points[0]), points[0].accuracy), style)
    panel.set_title("held-out accuracy")
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.set_ylim(0, 1.02)
    _finish(panel)


def _draw_guided(panel: "Axes", points: Sequence[CurvePoint], *, cost: Cost, until: int, colour: str) -> None:
    """A band behind the line up to step `until`, between evaluations by straight interpolation."""
    import numpy as np

    steps = [point.step for point in points]
    inside = [*(step for step in steps if step <= until), min(until, steps[-1])]
    costs = np.interp(inside, steps, [cost(point) for point in points])
    accuracies = np.interp(inside, steps, [point.accuracy for point in points])
    panel.plot(costs, accuracies, color=colour, lw=9, alpha=0.22, solid_capstyle="butt", zorder=1)


def _draw_fork(panel: "Axes", at: tuple[float, float], style: Look) -> None:
    panel.plot(*at, marker="D", ms=8, color="white", mec=style.colour, mew=2, zorder=5, clip_on=False)


def training_pictures(reports: Sequence[StepReport], limbs: Sequence[Limb], *, prefix: str) -> Iterator[Picture]:
    """One picture for each measure that any step has; a constant zero is not drawn."""
    for name, label, title in MEASURES:
        if any(report.metrics.get(name) for report in reports):
            yield Picture(
                name=f"{prefix}{title.replace(' ', '-').replace(chr(39), '')}",
                says=f"{title} by step, a line a branch",
                draw=partial(_draw_measure, reports=reports, limbs=limbs, name=name, label=label, title=title),
            )


def _draw_measure(
    panel: "Axes", *, reports: Sequence[StepReport], limbs: Sequence[Limb], name: str, label: str, title: str
) -> None:
    for place, limb in enumerate(limbs):
        style = look(place)
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
    panel.set_xlabel("optimiser step")
    panel.set_ylabel(label)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    _finish(panel)


def moving_mean(values: Sequence[float]) -> list[float]:
    """The mean over `SMOOTH` values around each; near the ends over those that there are."""
    half = SMOOTH // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _finish(panel: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(lambda value, _: compact(value))
    if len(panel.get_legend_handles_labels()[0]) > 1:
        panel.legend(frameon=False, labelcolor=QUIET, handlelength=2.6, fontsize=9)
