"""`npo compare`: what each method reached, what it cost on five axes, and the differences with intervals.

Run directories are only read. Costs come from `storage/cost_sums.py`: everything that a method needed, rolled-back work
and sampling included. The statistics are in `bootstrap.py` and `time_to_threshold.py`.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from npo_cli.errors import quote_path
from npo_cli.experiments.bootstrap import (
    Resampler,
    count_common_prompts,
    estimate_method,
    estimate_paired_difference,
    estimate_unpaired_difference,
    quarter_means,
)
from npo_cli.experiments.comparability import count_external_tokens, find_mismatches, method_differences
from npo_cli.experiments.load_methods import MethodRuns, SeedRun, load_methods
from npo_cli.experiments.method_curves import (
    ComparisonRange,
    compute_method_statistics,
    estimate_bands,
    find_comparison_range,
    get_cost,
    list_horizon_points,
    mean_costs_at_horizon,
)
from npo_cli.experiments.time_to_threshold import (
    SeedTimeToThreshold,
    restricted_mean,
    restricted_ratio,
    uncensored_ratio,
)
from npo_cli.report.comparison_summary import Comparison
from npo_cli.report.curve_plots import plot_method_curves
from npo_cli.report.plotting import MAX_CURVES
from npo_cli.scoring.hysteresis import estimate_hysteresis, seed_hysteresis
from npo_cli.storage.cost_sums import (
    compute_run_costs,
    cost_to_threshold,
    find_arrivals,
    neighbour_means,
    spread_thresholds,
)
from npo_cli.storage.lineage import find_last_guided_fork
from npo_cli.types.comparison import (
    Axis,
    CurveKind,
    MethodDifference,
    MethodHysteresis,
    MethodSummary,
    MethodTimeToThreshold,
    ResamplingUnit,
    SeedPoint,
    SpeedUp,
)
from npo_cli.types.rollouts import Notice

CompareRecord = (
    MethodSummary | MethodDifference | MethodTimeToThreshold | SpeedUp | MethodHysteresis | SeedPoint | Notice
)


def compare_runs(
    texts: Sequence[str], *, thresholds: Sequence[float], baseline: str | None, figure: Path | None
) -> Iterator[CompareRecord]:
    """Read, align, estimate; then the picture, where it is wanted."""
    methods = load_methods(texts, baseline=baseline)
    common = find_comparison_range(methods)
    yield from collect_warnings(methods, common)

    # Each method by itself.
    resampler = Resampler()
    summaries = [summarize_method(method, methods[0], common=common, resampler=resampler) for method in methods]
    yield from summaries

    # Each method next to the baseline.
    yield from (estimate_difference(method, methods[0], common=common, resampler=resampler) for method in methods[1:])
    levels = tuple(dict.fromkeys(thresholds)) or choose_method_thresholds(methods)
    for threshold in levels:
        ways = {method.name: collect_threshold_costs(threshold, method, common) for method in methods}
        yield from (
            summarize_time_to_threshold(name, threshold, seed_costs=found, common=common)
            for name, found in ways.items()
        )
        for method in methods[1:]:
            pair = (method.name, methods[0].name)
            yield estimate_speedup(pair, threshold, seed_costs=ways, common=common)
        yield from compare_best_held(threshold, methods, common)
    yield from compare_hysteresis(methods, sorted(levels))

    # What others may draw and count for themselves.
    points = [point for method in methods for one in method.runs for point in (*one.points, *one.held)]
    yield from points
    if figure is not None:
        plot_method_curves(estimate_bands(methods, common, resampler), figure, title=format_plot_title(summaries))
        yield Notice(message=f"picture: {figure}")


def read_comparison(folder: Path) -> Comparison:
    """The comparison of all runs of a bench, for its report."""
    texts = [str(folder)]
    records = tuple(compare_runs(texts, thresholds=(), baseline=None, figure=None))
    methods = load_methods(texts, baseline=None)
    bands = estimate_bands(methods, find_comparison_range(methods), Resampler())
    return Comparison(records=records, bands=tuple(bands))


def choose_method_thresholds(methods: Sequence[MethodRuns]) -> tuple[float, ...]:
    """Accuracies above the start of every seed, and reached by half of the seeds of at least one method."""
    means = [[[mean for _, mean in neighbour_means(one.curve)] for one in method.runs] for method in methods]
    best = max(statistics.median_low([max(seed) for seed in seeds]) for seeds in means)
    return spread_thresholds(max(seed[0] for seeds in means for seed in seeds), best)


def format_plot_title(methods: Sequence[MethodSummary]) -> str:
    """What the picture shows, and what its bands are taken over."""
    over = sorted({method.resampling_unit for method in methods})
    seeds = sorted({len(method.seeds) for method in methods})
    words = f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'} a method"
    if len(methods) > MAX_CURVES:
        return f"{words}; too many for bands"
    return f"{words}; band: 95 % over {' or over '.join(over)}"


def collect_warnings(methods: Sequence[MethodRuns], common: ComparisonRange) -> Iterator[Notice]:
    """What makes the comparison less than fair, or smaller than it looks."""
    for method in methods:
        for what in find_mismatches(method, methods[0]):
            yield Notice(message=f"not alike: {what} ({method.name})", level="warning")
        if method.seeds != methods[0].seeds:
            said = f"{method.name} has seeds {_listed(method.seeds)}, {methods[0].name} has {_listed(methods[0].seeds)}"
            yield Notice(message=f"{said}: only common seeds are paired", level="warning")
        elsewhere = count_external_tokens(method)
        if elsewhere:
            said = f"{method.name}: its guides had cost {elsewhere:,} tokens outside of its runs; no figure counts them"
            yield Notice(message=said, level="warning")
        bare = [one.run_branch for one in method.runs if not one.outcomes]
        if bare:
            missing = f"{method.name}: {len(bare)} of {len(method.runs)} seeds have no evaluation results per prompt"
            fix = f"npo eval {quote_path(bare[0].run.root)} --all --branch {bare[0].branch}"
            yield Notice(message=f"{missing}; {fix} adds them where there are checkpoints", level="warning")
    shortest = min((one for method in methods for one in method.runs), key=lambda one: one.points[-1].step)
    if any(one.points[-1].step > common.horizon for method in methods for one in method.runs):
        said = f"{shortest.run_branch.name} was last evaluated at step {common.horizon}"
        yield Notice(message=f"{said}: final accuracies of all methods are taken there", level="warning")


def summarize_method(
    method: MethodRuns, baseline: MethodRuns, *, common: ComparisonRange, resampler: Resampler
) -> MethodSummary:
    """Accuracy with intervals, costs, entropy and injected share of one method."""
    names, figures = compute_method_statistics(method, common)
    found = dict(zip(names, estimate_method(figures, resampler), strict=True))
    steps = [row for one in method.runs for step, row in one.steps.items() if step <= common.horizon]
    shares = [
        row["inject/grad_norm_fraction"]
        for row in steps
        if row.get("inject/slots") and "inject/grad_norm_fraction" in row
    ]
    return MethodSummary(
        method=method.name,
        seeds=method.seeds,
        runs=tuple(one.run_branch.name for one in method.runs),
        num_prompts=min(len(one.prompts) for one in method.runs) or None,
        resampling_unit=describe_resampling(len(method.runs), with_prompts=all(one.prompts for one in method.runs)),
        horizon=common.horizon,
        final_accuracy=found.pop("final"),
        areas=found,
        entropies=mean_entropies(method, common.horizon),
        injections_per_step=statistics.fmean(row.get("inject/slots", 0.0) for row in steps) if steps else 0.0,
        guide_gradient_share=statistics.fmean(shares) if shares else None,
        mean_costs=mean_costs_at_horizon(method, common),
        run_tokens=statistics.fmean(
            compute_run_costs(one.run_branch.run, one.run_branch.branch).tokens for one in method.runs
        ),
        teacher_tokens=statistics.fmean(point.teacher_tokens for point in list_horizon_points(method, common)),
        changed_settings=method_differences(method, baseline),
        mismatched_settings=find_mismatches(method, baseline),
    )


def describe_resampling(num_seeds: int, *, with_prompts: bool) -> ResamplingUnit:
    """What is resampled."""
    if num_seeds > 1:
        return "seeds and prompts" if with_prompts else "seeds"
    return "prompts" if with_prompts else "nothing"


def mean_entropies(method: MethodRuns, horizon: int) -> tuple[float | None, ...]:
    """Mean over the seeds of each quarter's mean; a quarter without any step in any seed has none."""
    by_seed = [
        quarter_means({step: row["entropy"] for step, row in one.steps.items() if "entropy" in row}, horizon)
        for one in method.runs
    ]
    known = [[value for value in column if value is not None] for column in zip(*by_seed, strict=True)]
    return tuple(statistics.fmean(some) if some else None for some in known)


def estimate_difference(
    method: MethodRuns, baseline: MethodRuns, *, common: ComparisonRange, resampler: Resampler
) -> MethodDifference:
    """Paired over the common seeds; without any, over all seeds of both, resampled independently."""
    seeds = set(method.seeds) & set(baseline.seeds)
    sides = [[one for one in side.runs if one.run_branch.seed in seeds or not seeds] for side in (method, baseline)]
    (names, mine), (_, theirs) = (
        compute_method_statistics(MethodRuns(name="", runs=tuple(side)), common) for side in sides
    )
    estimate = estimate_paired_difference if seeds else estimate_unpaired_difference
    found = dict(zip(names, estimate(mine, theirs, resampler), strict=True))
    pairs = list(zip(mine, theirs, strict=True)) if seeds else []
    place = names.index("final")
    return MethodDifference(
        method=method.name,
        baseline=baseline.name,
        num_pairs=len(pairs),
        num_prompts=min((count_common_prompts(*pair) for pair in pairs), default=0) or None,
        resampling_unit=describe_resampling(
            len(seeds) or min(len(mine), len(theirs)), with_prompts=all(one.prompts for one in (*mine, *theirs))
        ),
        final_accuracy=found.pop("final"),
        areas=found,
        num_not_lower=sum(
            bool(one.values_PF[:, place].mean() >= other.values_PF[:, place].mean() - 1e-12) for one, other in pairs
        ),
    )


def compare_best_held(
    threshold: float, methods: Sequence[MethodRuns], common: ComparisonRange
) -> Iterator[MethodTimeToThreshold | SpeedUp]:
    """The same for methods with a scout, by the best policy that they had paid for."""
    ways = {method.name: collect_threshold_costs(threshold, method, common, curve="best held") for method in methods}
    for method in methods:
        if any(one.held for one in method.runs):
            costs = ways[method.name]
            found = summarize_time_to_threshold(method.name, threshold, seed_costs=costs, common=common)
            yield replace(found, curve="best held")
            if method is not methods[0]:
                pair = (method.name, methods[0].name)
                yield replace(estimate_speedup(pair, threshold, seed_costs=ways, common=common), curve="best held")


def compare_hysteresis(methods: Sequence[MethodRuns], levels: Sequence[float]) -> Iterator[MethodHysteresis]:
    """H of every method that replays with a guide, from each level to the highest; the baseline is the unguided run."""
    baseline, *others = (
        [(one, find_last_guided_fork(one.run_branch.run, one.run_branch.branch)) for one in method.runs]
        for method in methods
    )
    unguided = {one.run_branch.seed: one.curve for one, fork_step in baseline if fork_step is None}
    *lower, target = levels or (1.0,)
    for method, runs in zip(methods[1:], others, strict=True):
        pairs = [
            (unguided[one.run_branch.seed], one.curve, fork_step)
            for one, fork_step in runs
            if fork_step is not None and one.run_branch.seed in unguided
        ]
        for level in lower:
            found = estimate_hysteresis(
                [
                    seed_hysteresis(*(find_arrivals(curve, level, target) for curve in pair), fork_step=fork_step)
                    for *pair, fork_step in pairs
                ]
            )
            if found is not None:
                yield MethodHysteresis(
                    method=method.name,
                    baseline=methods[0].name,
                    accuracy=level,
                    target=target,
                    steps=found[0],
                    bound=found[1],
                )


def collect_threshold_costs(
    threshold: float, method: MethodRuns, common: ComparisonRange, *, curve: CurveKind = "own"
) -> dict[Axis, list[SeedTimeToThreshold]]:
    """What every seed had spent on arrival, and at its end, by axis; the scout's step is no position of the method."""
    ways: dict[Axis, list[SeedTimeToThreshold]] = {
        axis: [] for axis in common.end_costs if axis != "step" or curve == "own"
    }
    for one in method.runs:
        if curve == "best held" and one.held:
            arrived = next((point for point in one.held if point.accuracy >= threshold), None)
        else:
            arrived = find_threshold_point(one, threshold)
        for axis, some in ways.items():
            cost = None if arrived is None else get_cost(arrived, axis)
            some.append(
                SeedTimeToThreshold(seed=one.run_branch.seed, cost=cost, total_cost=get_cost(one.points[-1], axis))
            )
    return ways


def find_threshold_point(one: SeedRun, threshold: float) -> SeedPoint | None:
    """The evaluation at which the threshold counts as reached; None where it never was."""
    step = cost_to_threshold(one.curve, threshold).step
    return next((point for point in one.points if point.step == step), None)


def summarize_time_to_threshold(
    name: str, threshold: float, *, seed_costs: dict[Axis, list[SeedTimeToThreshold]], common: ComparisonRange
) -> MethodTimeToThreshold:
    """Means over the seeds of one method."""
    some = next(iter(seed_costs.values()))
    return MethodTimeToThreshold(
        method=name,
        threshold=threshold,
        num_runs=len(some),
        num_reached=sum(way.cost is not None for way in some),
        costs={axis: statistics.fmean(way.lower_bound for way in found) for axis, found in seed_costs.items()},
        restricted_means={axis: restricted_mean(found, common.end_costs[axis]) for axis, found in seed_costs.items()},
        horizons={axis: common.end_costs[axis] for axis in seed_costs},
    )


def estimate_speedup(
    pair: tuple[str, str],
    threshold: float,
    *,
    seed_costs: dict[str, dict[Axis, list[SeedTimeToThreshold]]],
    common: ComparisonRange,
) -> SpeedUp:
    """Both ratios of a method and the baseline on every axis; a ratio that nothing can be said of is left out."""
    method, baseline = pair
    mine, theirs = seed_costs[method], seed_costs[baseline]
    arrived = {axis: uncensored_ratio(mine[axis], theirs[axis]) for axis in mine}
    restricted = {axis: restricted_ratio(mine[axis], theirs[axis], horizon=common.end_costs[axis]) for axis in mine}
    return SpeedUp(
        method=method,
        baseline=baseline,
        threshold=threshold,
        ratio_if_reached={axis: found for axis, found in arrived.items() if found is not None},
        restricted_mean_ratio={axis: found for axis, found in restricted.items() if found is not None},
    )


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
