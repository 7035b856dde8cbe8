"""Q, V and S = Q/V as pictures: of candidate guides ahead of a learner, and of the rollback distances of a probe."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from npo_cli.records import CheckpointScore
from npo_cli.report.bounded import IntervalEstimate, draw_intervals, collect_estimates
from npo_cli.report.figures import COLOURS, MUTED
from npo_cli.report.pictures import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORE_PANELS = (("quality", "Q", COLOURS[2]), ("variance", "V", COLOURS[1]), ("signal", "S = Q / V", COLOURS[0]))
SCORE_PLOT_WIDTH = 4.6
EstimatesGetter = Callable[[str], Sequence[IntervalEstimate]]
"""The estimates of one field, by its name."""


def make_score_plots(scores: Sequence[CheckpointScore], *, prefix: str) -> Iterator[Plot]:
    """Three pictures of one scoring."""
    ordered = sorted(scores, key=lambda one: one.distance)
    kinds = {"quality": ordered[0].quality_kind, "variance": ordered[0].variance_kind}
    best = "".join(f"best in {one.p_best:.0%}" for one in ordered if one.is_selected)

    yield from _pictures(
        partial(collect_estimates, ordered),
        kinds | {"signal": best},
        prefix=prefix,
        axis="optimiser steps ahead of the learner",
    )


def make_probe_plots(scores: Sequence[Mapping[str, Any]], *, prefix: str) -> Iterator[Plot]:
    """The same of one probe, whose evidence is plain data: an absent figure is one that was no number."""
    ordered = sorted(scores, key=lambda one: one["distance"])
    best = "".join(f"best in {one['p_best']:.0%}" for one in ordered if one.get("chosen") and "p_best" in one)
    kinds = {"quality": "pass rate", "variance": str(ordered[0].get("variance_kind", "")), "signal": best}

    def estimates(name: str) -> list[IntervalEstimate]:
        return [
            IntervalEstimate(
                distance=one["distance"],
                value=one.get(name, math.nan),
                low=one.get(f"{name}_low", math.nan),
                high=one.get(f"{name}_high", math.nan),
                selected_label=f"D* = {one['distance']}" if one.get("chosen") else None,
            )
            for one in ordered
        ]

    yield from _pictures(estimates, kinds, prefix=prefix, axis="rollback distance D")


def _pictures(estimates: EstimatesGetter, kinds: Mapping[str, str], *, prefix: str, axis: str) -> Iterator[Plot]:
    for name, letter, colour in SCORE_PANELS:
        title = ", ".join(filter(None, (letter, kinds[name])))
        told = "; ".join(f"{one.value:.3g} at {one.distance}" for one in estimates(name))
        draw = partial(
            _draw, estimates=estimates(name), title=title, axis=axis, colour=colour, is_variance=name == "variance"
        )
        yield Plot(name=f"{prefix}{name}", alt_text=f"{title} by {axis}: {told}", draw=draw, width=SCORE_PLOT_WIDTH)


def _draw(
    panel: "Axes", *, estimates: Sequence[IntervalEstimate], title: str, axis: str, colour: str, is_variance: bool
) -> None:
    draw_intervals(panel, estimates, colour=colour, allow_log=is_variance, muted_colour=MUTED)
    panel.set_title(title, color=colour)
    panel.set_xlabel(axis)
