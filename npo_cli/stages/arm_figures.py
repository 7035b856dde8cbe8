"""The figures of an arm as the bootstrap wants them: for each seed, prompt by prompt, linear in the outcomes.

Axes: E evaluations, P prompts, F figures.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npo_cli.compare_records import AXES, Axis, BandPoint, SeedPoint
from npo_cli.errors import NpoError, as_typed
from npo_cli.guide.arms import (
    Resampler,
    SeedFigures,
    area_weights,
    arm_estimates,
    common_range,
    line_weights,
)
from npo_cli.guide.quality import Floats
from npo_cli.stages.arms import Arm, SeedRun

NUM_LAST = 3
"""Evaluations whose mean is the final accuracy."""
FINEST = 120
"""Most places at which a curve is drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Common:
    """What all arms share."""

    horizon: int
    """The last step that every seed was evaluated at or beyond."""
    ranges: dict[Axis, tuple[float, float]]
    """The stretch of each axis that every curve covers; an axis without one is absent."""
    ends: dict[Axis, float]
    """The smallest cost at which any seed ended, on every axis known of all."""


def common_ground(arms: Sequence[Arm]) -> Common:
    """The seconds are an axis only where every run kept its clock, forward passes only where they are not tokens."""
    runs = [one for arm in arms for one in arm.runs]
    shortest, latest = min(runs, key=lambda one: one.points[-1].step), max(runs, key=lambda one: one.points[0].step)
    if latest.points[0].step > shortest.points[-1].step:
        raise NpoError(
            f"{shortest.place.name} was last evaluated at step {shortest.points[-1].step}, "
            f"{latest.place.name} not before step {latest.points[0].step}",
            f"npo eval {as_typed(latest.place.run.root)} --all --branch {latest.place.branch}",
        )
    twice = any(one.points[-1].forwards > one.points[-1].tokens for one in runs)
    axes = [axis for axis in AXES if twice or axis != "forwards"]
    known = [axis for axis in axes if all(getattr(one.points[-1], axis) is not None for one in runs)]
    curves = {axis: [costs_of(one, axis) for one in runs] for axis in known}
    stretches = {axis: common_range(some) for axis, some in curves.items()}
    return Common(
        horizon=shortest.points[-1].step,
        ranges={axis: stretch for axis, stretch in stretches.items() if stretch is not None},
        ends={axis: min(costs[-1] for costs in some) for axis, some in curves.items()},
    )


def cost_of(point: SeedPoint, axis: Axis) -> float:
    """What had been spent by then."""
    return float(getattr(point, axis))


def costs_of(one: SeedRun, axis: Axis) -> list[float]:
    """What had been spent at each of its evaluations."""
    return [cost_of(point, axis) for point in one.points]


def named_figures(arm: Arm, common: Common) -> tuple[list[str], list[SeedFigures]]:
    """`final`, and the area along each axis, of every seed."""
    found = []
    for one in arm.runs:
        areas = [area_weights(costs_of(one, axis), low=low, high=high) for axis, (low, high) in common.ranges.items()]
        found.append(figures_of(one, np.stack([final_weights(one, common.horizon), *areas], axis=1)))
    return ["final", *common.ranges], found


def final_weights(one: SeedRun, horizon: int) -> Floats:
    """weights_E of the mean of the last evaluations up to the horizon; a fork that stands twice is one evaluation."""
    places = {point.step: place for place, point in enumerate(one.points) if point.step <= horizon}
    last = [places[step] for step in sorted(places)[-NUM_LAST:]]
    weights_E = np.zeros(len(one.points))
    weights_E[last] = 1 / len(last)
    return weights_E


def figures_of(one: SeedRun, weights_EF: Floats) -> SeedFigures:
    """Each figure on each prompt; from accuracies alone where outcomes were not kept."""
    if one.outcomes:
        found = [one.outcomes[point.step] for point in one.points]
        shares_PE = np.array([np.asarray(some.num_correct) / some.num_samples for some in found]).T
    else:
        shares_PE = np.array([[point.accuracy for point in one.points]])
    return SeedFigures(seed=one.place.seed, prompts=one.prompts, values_PF=shares_PE @ weights_EF)


def standing_at(arm: Arm, common: Common) -> dict[str, float]:
    """Mean over the seeds of what standing at the horizon had cost, by axis."""
    last = [[point for point in one.points if point.step <= common.horizon][-1] for one in arm.runs]
    return {axis: statistics.fmean(cost_of(point, axis) for point in last) for axis in common.ends}


def bands(arms: Sequence[Arm], common: Common, resampler: Resampler) -> list[BandPoint]:
    """Mean curves with their intervals on every axis, each over the stretch that all seeds of its arm cover."""
    found = []
    for axis in common.ends:
        for arm in arms:
            curves = [costs_of(one, axis) for one in arm.runs]
            grid_F = places_between(curves)
            figures = [
                figures_of(one, line_weights(costs, grid_F)) for one, costs in zip(arm.runs, curves, strict=True)
            ]
            found += [
                BandPoint(arm=arm.name, axis=axis, cost=float(cost), accuracy=estimate)
                for cost, estimate in zip(grid_F, arm_estimates(figures, resampler), strict=True)
            ]
    return found


def places_between(curves: Sequence[Sequence[float]]) -> Floats:
    """Where an arm's curve is drawn: at its evaluations, or evenly where there are too many."""
    low, high = common_range(curves) or (curves[0][0], curves[0][0])
    places = np.unique([cost for costs in curves for cost in (low, *costs, high) if low <= cost <= high])
    return places if len(places) <= FINEST else np.linspace(low, high, FINEST)
