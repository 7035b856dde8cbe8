"""Differences of methods with intervals: statistics of several seeds, each over its held-out prompts.

A figure here is a mean over prompts of something linear in the outcomes (a final accuracy, an area under a curve), so
all of them go through one bootstrap. Seeds are drawn with return, and so are the prompts of each held-out set; seeds
that share a set share the draw. docs/how-to/compare-methods.md explains why, and what the intervals do not cover.
Axes: S seeds, P prompts, F figures, B rows of bootstrap weights (row 0 = the data as they are).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from npo_cli.scoring.quality import Z_95, Floats, Interval, bootstrap_counts, percentile_interval, wilson
from npo_cli.seeds import derive_seed
from npo_cli.types.comparison import Estimate

RESAMPLES = 2000
MAX_CACHED_COUNTS = 16_000_000
"""Counts kept in memory, of 8 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedStatistics:
    """What one seed of a method measured."""

    seed: int
    prompts: tuple[str, ...]
    """Keys of its held-out prompts; empty where outcomes were not kept."""
    values_PF: Floats
    """Each figure on each prompt. A single row, the mean, where outcomes were not kept."""


@dataclass(frozen=True, slots=True)
class Resampler:
    """The same draws for the same question: two methods on the same seeds and prompts are resampled together."""

    _held: dict[tuple[str, ...], Floats] = field(default_factory=dict)

    def prompt_means(self, figures: SeedStatistics) -> Floats:
        """means_BF over the resampled prompts; every row the same where outcomes were not kept."""
        if not figures.prompts:
            return np.repeat(figures.values_PF.mean(axis=0, keepdims=True), RESAMPLES + 1, axis=0)
        counts_BP = self._counts("prompts", figures.prompts)
        return counts_BP @ figures.values_PF / len(figures.prompts)

    def seed_weights(self, seeds: Sequence[int]) -> Floats:
        """weights_BS that sum to 1: counts of a draw, their distance from 1/S stretched by `small_sample(S)`."""
        even = 1.0 / len(seeds)
        return even + small_sample_factor(len(seeds)) * (
            self._counts("seeds", tuple(map(str, seeds))) / len(seeds) - even
        )

    def _counts(self, what: Literal["prompts", "seeds"], names: tuple[str, ...]) -> Floats:
        """How often each name is drawn; a function of the names in their order."""
        key = (what, *names)
        if key not in self._held:
            digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
            rng = np.random.default_rng(derive_seed("compare", digest))
            self._held[key] = bootstrap_counts(len(names), rng, RESAMPLES)
            # Sets are needed repeatedly, seed by seed; large ones are drawn again instead of being cached.
            while len(self._held) > 1 and sum(map(np.size, self._held.values())) > MAX_CACHED_COUNTS:
                del self._held[next(iter(self._held))]
        return self._held[key]


def small_sample_factor(num_seeds: int) -> float:
    """sqrt(S/(S - 1)) t(S - 1)/z: what makes a bootstrap of S values as wide as Student's interval; 1 for one seed.

    Unstretched, five seeds have the variance 4/5 too small, and tails of the normal where they need those of t.
    Source: Hesterberg 2015, The American Statistician 69(4).
    """
    from scipy.special import stdtrit

    if num_seeds < 2:
        return 1.0
    return float((num_seeds / (num_seeds - 1)) ** 0.5 * stdtrit(num_seeds - 1, 0.975) / Z_95)


def estimate_method(method: Sequence[SeedStatistics], resampler: Resampler) -> list[Estimate]:
    """Each figure of one method: mean over its seeds of the mean over their prompts."""
    means_BSF = np.stack([resampler.prompt_means(one) for one in method], axis=1)
    means_BF = np.einsum("bs,bsf->bf", resampler.seed_weights([one.seed for one in method]), means_BSF)
    return _estimates(means_BF, method, signed=False)


def estimate_paired_difference(
    method: Sequence[SeedStatistics], baseline: Sequence[SeedStatistics], resampler: Resampler
) -> list[Estimate]:
    """Each figure of the method minus that of the baseline, over pairs of one seed, on the prompts common to both.

    A pair without common prompts is compared by its means, with prompts resampled independently.
    """
    method, baseline = (sorted(side, key=lambda one: one.seed) for side in (method, baseline))
    assert [one.seed for one in method] == [one.seed for one in baseline], "pairs are of one seed"
    pairs = [restrict_to_common_prompts(mine, theirs) for mine, theirs in zip(method, baseline, strict=True)]
    means_BSF = np.stack(
        [resampler.prompt_means(mine) - resampler.prompt_means(theirs) for mine, theirs in pairs], axis=1
    )
    means_BF = np.einsum("bs,bsf->bf", resampler.seed_weights([one.seed for one in method]), means_BSF)
    return _estimates(means_BF, [mine for mine, _ in pairs], signed=True)


def estimate_unpaired_difference(
    method: Sequence[SeedStatistics], baseline: Sequence[SeedStatistics], resampler: Resampler
) -> list[Estimate]:
    """The same for methods without a common seed: each is resampled by itself."""
    sides = []
    for side in (method, baseline):
        means_BSF = np.stack([resampler.prompt_means(one) for one in side], axis=1)
        sides.append(np.einsum("bs,bsf->bf", resampler.seed_weights([one.seed for one in side]), means_BSF))
    return _estimates(sides[0] - sides[1], [*method, *baseline], signed=True)


def restrict_to_common_prompts(mine: SeedStatistics, theirs: SeedStatistics) -> tuple[SeedStatistics, SeedStatistics]:
    """Both on their common prompts, in one order; unchanged where they share none."""
    if mine.prompts == theirs.prompts:
        return mine, theirs
    places = {key: place for place, key in enumerate(theirs.prompts)}
    shared = [(place, places[key]) for place, key in enumerate(mine.prompts) if key in places]
    if not shared:
        return mine, theirs
    ours, others = (list(column) for column in zip(*shared, strict=True))
    keys = tuple(mine.prompts[place] for place in ours)
    return (
        SeedStatistics(seed=mine.seed, prompts=keys, values_PF=mine.values_PF[ours]),
        SeedStatistics(seed=theirs.seed, prompts=keys, values_PF=theirs.values_PF[others]),
    )


def count_common_prompts(mine: SeedStatistics, theirs: SeedStatistics) -> int:
    """Held-out prompts that both have."""
    return len(set(mine.prompts) & set(theirs.prompts))


def _estimates(means_BF: Floats, seeds: Sequence[SeedStatistics], *, signed: bool) -> list[Estimate]:
    """No interval where there was nothing to draw: one seed without outcomes."""
    num = len({one.seed for one in seeds})
    num_prompts = len({key for one in seeds for key in one.prompts})
    found = []
    for values_B in means_BF.T:
        low, high = _interval(values_B, num_prompts or num, signed=signed)
        drawn = num > 1 or num_prompts > 1
        found.append(
            Estimate(
                value=float(values_B[0]),
                low=low if drawn else None,
                high=high if drawn else None,
                num_used=num,
                num_total=num,
            )
        )
    return found


def _interval(values_B: Floats, num: int, *, signed: bool) -> Interval:
    """Percentiles; Wilson's interval of `num` trials where every draw says the same, which is no certainty.

    A difference lies in [-1, 1] and is seen there as a share of [0, 1].
    """
    if np.ptp(values_B) > 1e-12:
        low, high = percentile_interval(values_B)
    else:
        share = (1.0 + float(values_B[0])) / 2.0 if signed else float(values_B[0])
        low, high = wilson(share * num, num)
        low, high = (2.0 * low - 1.0, 2.0 * high - 1.0) if signed else (low, high)
    # Few seeds that differ much say no more than what an accuracy is.
    return max(low, -1.0 if signed else 0.0), min(high, 1.0)


def interpolation_weights(costs_E: Sequence[float], grid_F: Floats) -> Floats:
    """weights_EF with which evaluations enter the polyline through (cost, accuracy) at each place of the grid."""
    return np.stack([np.interp(grid_F, costs_E, unit) for unit in np.eye(len(costs_E))])


def area_weights(costs_E: Sequence[float], *, low: float, high: float) -> Floats:
    """weights_E with which evaluations enter the mean accuracy along an axis, over [low, high].

    area = 1/(high - low) * integral of that polyline, by the trapezoid rule: linear in the accuracies.
    """
    assert costs_E[0] <= low < high <= costs_E[-1], "nothing is said beyond the curve"
    inside = [cost for cost in costs_E if low < cost < high]
    grid = np.unique([low, *inside, high])
    return np.trapezoid(interpolation_weights(costs_E, grid), grid, axis=1) / (high - low)


def common_range(curves: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The span of one axis that every curve covers; None where there is none."""
    low, high = max(curve[0] for curve in curves), min(curve[-1] for curve in curves)
    return (low, high) if low < high else None


def quarter_means(values: Mapping[int, float], horizon: int) -> tuple[float | None, ...]:
    """Mean over the steps in each quarter ((q - 1) H/4, q H/4]; None where none was measured."""
    found = []
    for quarter in range(4):
        inside = [value for step, value in values.items() if quarter * horizon < 4 * step <= (quarter + 1) * horizon]
        found.append(float(np.mean(inside)) if inside else None)
    return tuple(found)
