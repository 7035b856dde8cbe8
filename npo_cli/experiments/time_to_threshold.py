"""What it took to reach a threshold, where some seeds never did.

A seed that ended below the threshold is *censored*: its cost is known to be above what it had spent, and no more.
Leaving it out flatters the method that fails more often. Two figures are honest without it: a mean in which it counts
what it had spent (a lower bound), and the restricted mean,

    RM(h) = E[min(T, h)] = integral from 0 to h of P(T > t) dt,

up to a cost h that every seed lived to see. Then no min(T, h) is unknown, and the mean of the values is the integral
of the Kaplan-Meier curve itself. Source: Royston and Parmar 2013, BMC Medical Research Methodology 13:152.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from npo_cli.scoring.quality import mean_with_interval
from npo_cli.types.comparison import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedTimeToThreshold:
    """One seed's way to a threshold, on one axis."""

    seed: int
    cost: float | None
    """What it had spent on arrival; None: it never arrived."""
    total_cost: float
    """What it had spent in all."""

    @property
    def lower_bound(self) -> float:
        """The cost, or what is known to be less than it."""
        return self.total_cost if self.cost is None else self.cost

    def restricted_cost(self, horizon: float) -> float:
        """min(cost, horizon), which is known, as no seed ended before the horizon."""
        assert self.cost is not None or self.total_cost >= horizon, "a seed that ended before the horizon has no value"
        return horizon if self.cost is None else min(self.cost, horizon)


def restricted_mean(method: Sequence[SeedTimeToThreshold], horizon: float) -> float:
    """RM(horizon)."""
    return statistics.fmean(one.restricted_cost(horizon) for one in method)


def uncensored_ratio(method: Sequence[SeedTimeToThreshold], baseline: Sequence[SeedTimeToThreshold]) -> Estimate | None:
    """Geometric mean of baseline / method over the pairs of seeds in which both reached it; None without such a pair.

    exp of the mean log ratio and of its Student's interval; that of method / baseline is the inverse. The arithmetic
    mean of the ratios of equal costs is about 1 + CV^2.
    """
    theirs = {one.seed: one for one in baseline}
    pairs = [(theirs[one.seed].cost, one.cost) for one in method if one.seed in theirs]
    logs = [math.log(slow / fast) for slow, fast in pairs if slow and fast]
    if not logs:
        return None
    found = mean_with_interval(logs, of=len(pairs))
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return replace(found, value=math.exp(found.value), low=low, high=high)


def restricted_ratio(
    method: Sequence[SeedTimeToThreshold], baseline: Sequence[SeedTimeToThreshold], *, horizon: float
) -> Estimate | None:
    """R = RM of the baseline / RM of the method over common seeds, arrived or not; over all where they share none.

    Interval R -+ t(n - 1) sd(u)/sqrt(n) with u = (slow - R fast)/RM of the method, the ratio estimator's (Cochran 1977,
    Sampling Techniques, chapter 6); unpaired, none. None where neither ever arrived, or the method did at no cost.
    A horizon that few reached hides what lies beyond it, and the ratio is then nearer to 1 than the truth.
    """
    slow_by_seed = {one.seed: one for one in baseline}
    pairs = [(slow_by_seed[one.seed], one) for one in method if one.seed in slow_by_seed]
    slow, fast = ([slow for slow, _ in pairs], [fast for _, fast in pairs]) if pairs else (baseline, method)
    if all(one.cost is None for one in (*slow, *fast)):
        return None
    mean = restricted_mean(fast, horizon)
    if mean <= 0:
        return None
    ratio, of = restricted_mean(slow, horizon) / mean, max(len(method), len(baseline))
    if len(pairs) < 2:
        return Estimate(value=ratio, num_used=len(pairs), num_total=of)
    spread = mean_with_interval(
        [(slow.restricted_cost(horizon) - ratio * fast.restricted_cost(horizon)) / mean for slow, fast in pairs], of=of
    )
    assert spread.low is not None and spread.high is not None
    # Few pairs that differ much say no more than what a ratio of costs is.
    low = max(ratio + spread.low, 0.0)
    return Estimate(value=ratio, low=low, high=ratio + spread.high, num_used=len(pairs), num_total=of)
