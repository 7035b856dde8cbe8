"""Statistics of a method for the bootstrap: per seed and prompt, linear in the results.

Axes: E evaluations, P prompts, F statistics.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npo_cli.errors import NpoError, quote_path
from npo_cli.experiments.bootstrap import (
    Resampler,
    SeedStatistics,
    area_weights,
    common_range,
    estimate_method,
    interpolation_weights,
)
from npo_cli.experiments.load_methods import MethodRuns, SeedRun
from npo_cli.scoring.quality import Floats
from npo_cli.types.comparison import AXES, Axis, CurveBandPoint, SeedPoint

NUM_FINAL_EVALS = 3
"""Evaluations whose mean is the final accuracy."""
MAX_CURVE_POINTS = 120
"""Most points at which a curve is plotted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonRange:
    """The range that all methods cover."""

    horizon: int
    """The last step that every seed was evaluated at or beyond."""
    ranges: dict[Axis, tuple[float, float]]
    """The range of each axis that every curve covers; an axis without one is absent."""
    end_costs: dict[Axis, float]
    """The smallest final cost of any seed, on every axis that all have."""


def find_comparison_range(methods: Sequence[MethodRuns]) -> ComparisonRange:
    """Seconds are an axis only where every run recorded them, forward passes only where they differ from tokens."""
    runs = [one for method in methods for one in method.runs]
    shortest, latest = min(runs, key=lambda one: one.points[-1].step), max(runs, key=lambda one: one.points[0].step)
    if latest.points[0].step > shortest.points[-1].step:
        raise NpoError(
            f"{shortest.run_branch.name} was last evaluated at step {shortest.points[-1].step}, "
            f"{latest.run_branch.name} not before step {latest.points[0].step}",
            f"npo eval {quote_path(latest.run_branch.run.root)} --all --branch {latest.run_branch.branch}",
        )
    twice = any(one.points[-1].forwards > one.points[-1].tokens for one in runs)
    axes = [axis for axis in AXES if twice or axis != "forwards"]
    known = [axis for axis in axes if all(getattr(one.points[-1], axis) is not None for one in runs)]
    curves = {axis: [list_costs(one, axis) for one in runs] for axis in known}
    ranges = {axis: common_range(some) for axis, some in curves.items()}
    return ComparisonRange(
        horizon=shortest.points[-1].step,
        ranges={axis: span for axis, span in ranges.items() if span is not None},
        end_costs={axis: min(costs[-1] for costs in some) for axis, some in curves.items()},
    )


def get_cost(point: SeedPoint, axis: Axis) -> float:
    """The total cost by then."""
    return float(getattr(point, axis))


def list_costs(one: SeedRun, axis: Axis) -> list[float]:
    """The total cost at each of its evaluations."""
    return [get_cost(point, axis) for point in one.points]


def compute_method_statistics(method: MethodRuns, common: ComparisonRange) -> tuple[list[str], list[SeedStatistics]]:
    """`final`, and the area along each axis, of every seed."""
    found = []
    for one in method.runs:
        areas = [area_weights(list_costs(one, axis), low=low, high=high) for axis, (low, high) in common.ranges.items()]
        found.append(compute_seed_statistics(one, np.stack([final_weights(one, common.horizon), *areas], axis=1)))
    return ["final", *common.ranges], found


def final_weights(one: SeedRun, horizon: int) -> Floats:
    """weights_E of the mean of the last evaluations up to the horizon; a fork with two points is one evaluation."""
    indices = {point.step: index for index, point in enumerate(one.points) if point.step <= horizon}
    last = [indices[step] for step in sorted(indices)[-NUM_FINAL_EVALS:]]
    weights_E = np.zeros(len(one.points))
    weights_E[last] = 1 / len(last)
    return weights_E


def compute_seed_statistics(one: SeedRun, weights_EF: Floats) -> SeedStatistics:
    """Each statistic on each prompt; from accuracies where there are no results per prompt."""
    if one.outcomes:
        found = [one.outcomes[point.step] for point in one.points]
        shares_PE = np.array([np.asarray(some.num_correct) / some.num_samples for some in found]).T
    else:
        shares_PE = np.array([[point.accuracy for point in one.points]])
    return SeedStatistics(seed=one.run_branch.seed, prompts=one.prompts, values_PF=shares_PE @ weights_EF)


def mean_costs_at_horizon(method: MethodRuns, common: ComparisonRange) -> dict[str, float]:
    """Mean over the seeds of the cost of reaching the horizon, by axis."""
    last = list_horizon_points(method, common)
    return {axis: statistics.fmean(get_cost(point, axis) for point in last) for axis in common.end_costs}


def list_horizon_points(method: MethodRuns, common: ComparisonRange) -> list[SeedPoint]:
    """The last evaluation of each seed up to the horizon."""
    return [[point for point in one.points if point.step <= common.horizon][-1] for one in method.runs]


def estimate_bands(
    methods: Sequence[MethodRuns], common: ComparisonRange, resampler: Resampler
) -> list[CurveBandPoint]:
    """Mean curves with their intervals on every axis, each over the range that all seeds of the method cover."""
    found = []
    for axis in common.end_costs:
        for method in methods:
            curves = [list_costs(one, axis) for one in method.runs]
            grid_F = make_cost_grid(curves)
            figures = [
                compute_seed_statistics(one, interpolation_weights(costs, grid_F))
                for one, costs in zip(method.runs, curves, strict=True)
            ]
            found += [
                CurveBandPoint(method=method.name, axis=axis, cost=float(cost), accuracy=estimate)
                for cost, estimate in zip(grid_F, estimate_method(figures, resampler), strict=True)
            ]
    return found


def make_cost_grid(curves: Sequence[Sequence[float]]) -> Floats:
    """Where a curve is plotted: at its evaluations, or evenly spaced where there are too many."""
    low, high = common_range(curves) or (curves[0][0], curves[0][0])
    costs = np.unique([cost for curve in curves for cost in (low, *curve, high) if low <= cost <= high])
    return costs if len(costs) <= MAX_CURVE_POINTS else np.linspace(low, high, MAX_CURVE_POINTS)
