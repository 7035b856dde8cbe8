"""What it took to reach a threshold, where some seeds never did.

A seed that ended below the threshold is *censored*: its cost is known to be above what it had spent, and no more.
Leaving it out flatters the arm that fails more often. Two figures are honest without it: a mean in which it counts
what it had spent (a lower bound), and the restricted mean,

    RM(h) = E[min(T, h)] = integral from 0 to h of P(T > t) dt,

up to a cost h that every seed lived to see. Then no min(T, h) is unknown, and the mean of the values is the integral
of the Kaplan-Meier curve itself. Source: Royston and Parmar 2013, BMC Medical Research Methodology 13:152.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npo_cli.compare_records import Estimate
from npo_cli.guide.arms import Resampler
from npo_cli.guide.quality import Floats, percentile_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One seed's way to a threshold, on one axis."""

    seed: int
    cost: float | None
    """What it had spent on arrival; None: it never arrived."""
    end: float
    """What it had spent in all."""

    @property
    def bound(self) -> float:
        """The cost, or what is known to be less than it."""
        return self.end if self.cost is None else self.cost

    def restricted(self, horizon: float) -> float:
        """min(cost, horizon), which is known, as no seed ended before the horizon."""
        assert self.cost is not None or self.end >= horizon, "a seed that ended before the horizon has no value"
        return horizon if self.cost is None else min(self.cost, horizon)


def restricted_mean(arm: Sequence[Way], horizon: float) -> float:
    """RM(horizon)."""
    return statistics.fmean(one.restricted(horizon) for one in arm)


def student(values: Sequence[float], *, of: int) -> Estimate:
    """Mean with its 95 % interval, mean -+ t(n - 1) sd/sqrt(n); of one value the value alone."""
    from scipy.special import stdtrit

    mean, num = statistics.fmean(values), len(values)
    if num < 2:
        return Estimate(value=mean, num=num, of=of)
    half = float(stdtrit(num - 1, 0.975)) * statistics.stdev(values) / num**0.5
    return Estimate(value=mean, low=mean - half, high=mean + half, num=num, of=of)


def arrived_ratio(arm: Sequence[Way], baseline: Sequence[Way]) -> Estimate | None:
    """Mean of baseline / arm over the pairs of one seed in which both arrived, at a cost; None without such a pair."""
    theirs = {one.seed: one for one in baseline}
    pairs = [(theirs[one.seed].cost, one.cost) for one in arm if one.seed in theirs]
    ratios = [slow / fast for slow, fast in pairs if slow and fast]
    return student(ratios, of=len(pairs)) if ratios else None


def restricted_ratio(
    arm: Sequence[Way], baseline: Sequence[Way], *, horizon: float, resampler: Resampler
) -> Estimate | None:
    """RM of the baseline over RM of the arm; 95 % interval by resampling seeds, the two of a pair together.

    Over the seeds that both have, arrived or not; over all where they share none. None where neither ever arrived, or
    an arm may arrive at no cost: then it says nothing. A horizon that few reached hides what lies
    beyond it, and the ratio is then nearer to 1 than the truth.
    """
    common = {one.seed for one in arm} & {one.seed for one in baseline}
    slow, fast = ([one for one in side if one.seed in common or not common] for side in (baseline, arm))
    if all(one.cost is None for one in (*slow, *fast)):
        return None
    slow_B, fast_B = (_restricted_means(side, horizon, resampler) for side in (slow, fast))
    if min(slow_B.min(), fast_B.min()) <= 0:
        return None
    ratio_B = slow_B / fast_B
    drawn = max(len(slow), len(fast)) > 1
    low, high = percentile_interval(ratio_B) if drawn else (None, None)
    num, of = min(len(slow), len(fast)), max(len(arm), len(baseline))
    return Estimate(value=float(ratio_B[0]), low=low, high=high, num=num, of=of)


def _restricted_means(side: Sequence[Way], horizon: float, resampler: Resampler) -> Floats:
    """RM of each resample of the seeds; row 0 is RM itself."""
    ordered = sorted(side, key=lambda one: one.seed)
    values_S = np.array([one.restricted(horizon) for one in ordered])
    return resampler.seed_weights([one.seed for one in ordered]) @ values_S
