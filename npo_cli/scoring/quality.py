"""Q: the pass rate of a guide on prompts that the learner fails, with its intervals.

Works on counts of correct samples. A prompt is a cluster: its samples are resampled together, never one by one.
Axes: P prompts, B bootstrap resamples (row 0 = the data as they are).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npo_cli.types.comparison import Estimate

Floats = NDArray[np.float64]
Interval = tuple[float, float]

Z_95 = 1.959964
TAIL_95 = 0.025


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPassCount:
    """How many of one policy's samples of one prompt are correct."""

    prompt_id: str
    num_samples: int
    num_correct: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the m samples, without replacement, contain a correct one: 1 - C(m-c, k)/C(m, k).

    Unbiased for pass@k; 1 when m - c < k; k is capped at m. Source: Chen et al. 2021.
    """
    assert num_samples >= 1 and 0 <= num_correct <= num_samples and k >= 1
    k = min(k, num_samples)
    num_wrong = num_samples - num_correct
    if num_wrong < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(num_wrong + 1, num_samples + 1))


def smooth_quality(quality: float | Floats, num_prompts: float | Floats) -> float | Floats:
    """Q~ = (M Q + 1/2)/(M + 1): never 0, so that log S stays finite. 1/2 where there are no prompts."""
    return (num_prompts * quality + 0.5) / (num_prompts + 1.0)


def wilson(successes: float, trials: float, z: float = Z_95) -> Interval:
    """Wilson's score interval of a rate, also for fractional counts; (0, 1) without trials.

    (p + z^2/2M -+ z sqrt(p(1-p)/M + z^2/4M^2)) / (1 + z^2/M). scipy's form takes whole counts only.
    """
    if trials <= 0:
        return 0.0, 1.0
    rate = successes / trials
    scale = 1.0 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1.0 - rate) / trials + z * z / (4 * trials * trials)) / scale
    low = 0.0 if successes <= 0 else max(0.0, middle - half)
    high = 1.0 if successes >= trials else min(1.0, middle + half)
    return low, high


def newcombe(rate: float, other: float, trials: float, z: float = Z_95) -> Interval:
    """Interval of the difference of two rates of as many trials: square-and-add of Wilson's (Newcombe 1998)."""
    (low, high), (other_low, other_high) = wilson(rate * trials, trials, z), wilson(other * trials, trials, z)
    net = rate - other
    return net - math.hypot(rate - low, other_high - other), net + math.hypot(high - rate, other - other_low)


def jeffreys(successes: float, trials: float, level: float = 0.95) -> Interval:
    """Equal-tailed interval of Beta(c + 1/2, M - c + 1/2); its lower bound is 0 at c = 0, its upper 1 at c = M.

    Source: Brown, Cai and DasGupta 2001.
    """
    from scipy.stats import beta

    low, high = beta.interval(level, successes + 0.5, trials - successes + 0.5)
    return 0.0 if successes <= 0 else float(low), 1.0 if successes >= trials else float(high)


def bootstrap_counts(num_prompts: int, rng: np.random.Generator, resamples: int) -> Floats:
    """counts_BP: how often each resample contains each prompt. Row 0 is all ones (the data); the others sum to P."""
    counts_BP = rng.multinomial(num_prompts, np.full(num_prompts, 1.0 / num_prompts), size=resamples)
    return np.vstack([np.ones((1, num_prompts)), counts_BP])


def percentile_interval(values_B: Floats, tail: float = TAIL_95) -> Interval:
    """The percentiles 100 tail and 100 (1 - tail) of rows 1.., extended to contain row 0, the estimate itself."""
    estimate = float(values_B[0])
    if len(values_B) == 1:
        return estimate, estimate
    low, high = np.quantile(values_B[1:], (tail, 1.0 - tail))
    return min(float(low), estimate), max(float(high), estimate)


def pass_rate_interval(values_P: Floats, means_B: Floats) -> Interval:
    """Interval of a mean of per-prompt pass rates; Wilson's with M = P where all prompts agree.

    Without spread between prompts (all 0, all 1, a single one) a bootstrap interval would have zero width.
    """
    if np.ptp(values_P) > 0:
        return percentile_interval(means_B)
    return wilson(float(values_P.sum()), len(values_P))


def cluster_interval(values_P: Floats | Sequence[float], rng: np.random.Generator, resamples: int) -> Interval:
    """95 % interval of the mean over prompts: percentiles of the mean over resampled prompts."""
    assert len(values_P) > 0
    values_P = np.asarray(values_P, dtype=np.float64)
    counts_BP = bootstrap_counts(len(values_P), rng, resamples)
    return pass_rate_interval(values_P, counts_BP @ values_P / counts_BP.sum(axis=1))


def intraclass_correlation(correct_P: Floats, samples_P: Floats) -> float:
    """How alike samples of one prompt are: (MSB - MSW)/(MSB + (m0 - 1) MSW), one-way ANOVA, cut to [0, 1].

    m0 = (N - sum m^2/N)/(P - 1) allows unequal m. 1 (the conservative value) where it cannot be estimated: fewer
    than two prompts, one sample each, or no spread at all.
    """
    num_prompts, total = len(correct_P), float(samples_P.sum())
    if num_prompts < 2 or total <= num_prompts:
        return 1.0
    rates_P = correct_P / samples_P
    mean = correct_P.sum() / total
    between = float((samples_P * (rates_P - mean) ** 2).sum()) / (num_prompts - 1)
    within = float((samples_P * rates_P * (1.0 - rates_P)).sum()) / (total - num_prompts)
    typical = (total - float((samples_P**2).sum()) / total) / (num_prompts - 1)
    spread = between + (typical - 1.0) * within
    return 1.0 if spread <= 0 else min(1.0, max(0.0, (between - within) / spread))


def effective_trials(num_prompts: int, num_samples: float, icc: float) -> float:
    """M_eff = M m/(1 + (m - 1) ICC): independent trials that M prompts of m samples are worth. M at ICC 1, M m at 0."""
    return num_prompts * num_samples / (1.0 + (num_samples - 1.0) * icc)


def mean_with_interval(values: Sequence[float], *, of: int) -> Estimate:
    """Mean with its 95 % interval, mean -+ t(n - 1) sd/sqrt(n); of one value the value alone."""
    from scipy.special import stdtrit

    mean, num = statistics.fmean(values), len(values)
    if num < 2:
        return Estimate(value=mean, num_used=num, num_total=of)
    half = float(stdtrit(num - 1, 0.975)) * statistics.stdev(values) / num**0.5
    return Estimate(value=mean, low=mean - half, high=mean + half, num_used=num, num_total=of)
