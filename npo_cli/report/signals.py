"""Q, V and S = Q/V as pictures: of candidate guides ahead of a learner, and of the rollback distances of a probe."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from npo_cli.records import CheckpointScore
from npo_cli.report.bounded import Bounded, draw_bounded, of_scores
from npo_cli.report.figures import COLOURS, QUIET
from npo_cli.report.pictures import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = (("quality", "Q", COLOURS[2]), ("variance", "V", COLOURS[1]), ("signal", "S = Q / V", COLOURS[0]))
WIDTH = 4.6
Estimates = Callable[[str], Sequence[Bounded]]
"""The estimates of one field, by its name."""


def guide_pictures(scores: Sequence[CheckpointScore], *, prefix: str) -> Iterator[Picture]:
    """Three pictures of one scoring."""
    ordered = sorted(scores, key=lambda one: one.distance)
    kinds = {"quality": ordered[0].quality_kind, "variance": ordered[0].variance_kind}
    best = "".join(f"best in {one.p_best:.0%}" for one in ordered if one.chosen)

    yield from _pictures(
        partial(of_scores, ordered),
        kinds | {"signal": best},
        prefix=prefix,
        axis="optimiser steps ahead of the learner",
    )


def rollback_pictures(scores: Sequence[Mapping[str, Any]], *, prefix: str) -> Iterator[Picture]:
    """The same of one probe, whose evidence is plain data: an absent figure is one that was no number."""
    ordered = sorted(scores, key=lambda one: one["distance"])
    best = "".join(f"best in {one['p_best']:.0%}" for one in ordered if one.get("chosen") and "p_best" in one)
    kinds = {"quality": "pass rate", "variance": str(ordered[0].get("variance_kind", "")), "signal": best}

    def estimates(name: str) -> list[Bounded]:
        return [
            Bounded(
                distance=one["distance"],
                value=one.get(name, math.nan),
                low=one.get(f"{name}_low", math.nan),
                high=one.get(f"{name}_high", math.nan),
                chosen_as=f"D* = {one['distance']}" if one.get("chosen") else None,
            )
            for one in ordered
        ]

    yield from _pictures(estimates, kinds, prefix=prefix, axis="rollback distance D")


def _pictures(estimates: Estimates, kinds: Mapping[str, str], *, prefix: str, axis: str) -> Iterator[Picture]:
    for name, letter, colour in AXES:
        title = ", ".join(filter(None, (letter, kinds[name])))
        told = "; ".join(f"{one.value:.3g} at {one.distance}" for one in estimates(name))
        draw = partial(
            _draw, estimates=estimates(name), title=title, axis=axis, colour=colour, is_variance=name == "variance"
        )
        yield Picture(name=f"{prefix}{name}", says=f"{title} by {axis}: {told}", draw=draw, width=WIDTH)


def _draw(
    panel: "Axes", *, estimates: Sequence[Bounded], title: str, axis: str, colour: str, is_variance: bool
) -> None:
    draw_bounded(panel, estimates, colour=colour, may_be_log=is_variance, quiet=QUIET)
    panel.set_title(title, color=colour)
    panel.set_xlabel(axis)
