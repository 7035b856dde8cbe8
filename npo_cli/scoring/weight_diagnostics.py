"""Diagnostics of importance weights (effective sample size, largest weight, Pareto k), and the samples V rests on.

Axis: N samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npo_cli.scoring.quality import Floats
from npo_cli.scoring.variance import SampleRatio, log_sum_exp

MIN_SAMPLES = 32
LOWEST_ESS_FRACTION = 0.1
LARGEST_WEIGHT_SHARE = 0.5
LARGEST_PARETO_K = 0.7
SHORTEST_TAIL = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDiagnostics:
    """Whether a few weights dominate an average over all of them."""

    num_samples: int
    ess_fraction: float
    """(sum w)^2/(N sum w^2); 1 for equal weights, 0 without samples."""
    max_weight_share: float
    """Largest weight over the sum of weights."""
    pareto_k: float | None
    """Shape of the weights' upper tail; None if the tail is too short or flat for a fit."""

    @property
    def is_dominated(self) -> bool:
        """ESS fraction < 0.1, or one weight above half of the sum, or k > 0.7.

        The second condition matters below 40 samples, where four equal weights already give an ESS fraction of 0.1.
        """
        heavy = self.pareto_k is not None and self.pareto_k > LARGEST_PARETO_K
        return self.ess_fraction < LOWEST_ESS_FRACTION or self.max_weight_share > LARGEST_WEIGHT_SHARE or heavy


def diagnose_weights(samples: Sequence[SampleRatio]) -> WeightDiagnostics:
    """Diagnose the sequence weights of one guide."""
    if not samples:
        return WeightDiagnostics(num_samples=0, ess_fraction=0.0, max_weight_share=1.0, pareto_k=None)
    log_w_N = np.array([sample.log_w for sample in samples], dtype=np.float64)
    log_total = float(log_sum_exp(log_w_N, axis=0))
    log_fraction = 2 * log_total - float(log_sum_exp(2 * log_w_N, axis=0)) - math.log(len(samples))
    return WeightDiagnostics(
        num_samples=len(samples),
        ess_fraction=min(1.0, math.exp(log_fraction)),
        max_weight_share=math.exp(float(log_w_N.max()) - log_total),
        pareto_k=pareto_k(log_w_N),
    )


def select_correct(samples: Sequence[SampleRatio]) -> tuple[SampleRatio, ...]:
    """The verified-correct samples: the only ones that are injected."""
    return tuple(sample for sample in samples if sample.is_correct)


def select_variance_samples(samples: Sequence[Sequence[SampleRatio]]) -> list[tuple[SampleRatio, ...]]:
    """The samples that V rests on, of each candidate by itself: its correct ones if there are 32, else all of them.

    A candidate with few correct samples, which is hardly chosen, does not change how the others are measured.
    """
    return [select_correct(own) if has_enough_correct(own) else tuple(own) for own in samples]


def has_enough_correct(samples: Sequence[SampleRatio]) -> bool:
    """Whether V rests on the correct samples alone: there are 32 of them."""
    return len(select_correct(samples)) >= MIN_SAMPLES


def pareto_k(log_w_N: Floats) -> float | None:
    """Shape k of a generalised Pareto distribution fitted to the largest min(N/5, 3 sqrt N) weights.

    k > 1/2: infinite variance; k > 0.7: averages are unreliable. None when fewer than 5 of them
    exceed their threshold. Source: Vehtari et al., 1507.02646 (PSIS).
    """
    num = len(log_w_N)
    num_tail = int(min(num / 5, 3 * math.sqrt(num)))
    if num_tail < SHORTEST_TAIL:
        return None
    sorted_N = np.sort(np.exp(log_w_N - log_w_N.max()))
    excess = sorted_N[-num_tail:] - sorted_N[-num_tail - 1]
    # Rounding makes equal weights differ in the last bits: such an excess is not a tail.
    excess = excess[excess > 1e-12]
    if len(excess) < SHORTEST_TAIL:
        return None
    # A prior of ten pseudo-observations at 1/2 stabilises the fit of a short tail.
    return (len(excess) * _pareto_shape(excess) + 10 * 0.5) / (len(excess) + 10)


def _pareto_shape(excess: Floats) -> float:
    """Zhang and Stephens (2009): average theta = -k/sigma over a grid by profile likelihood, k = mean log(1 - theta x).

    `excess` is sorted, positive, in units of the largest weight.
    """
    num = len(excess)
    num_grid = 30 + int(math.sqrt(num))
    quartile = excess[int(num / 4 + 0.5) - 1]
    grid = np.arange(1, num_grid + 1) - 0.5
    theta = 1.0 / excess[-1] + (1.0 - np.sqrt(num_grid / grid)) / (3.0 * quartile)
    shape = np.log1p(-theta[:, None] * excess).mean(axis=1)
    log_likelihood = num * (np.log(-theta / shape) - shape - 1.0)
    posterior = np.exp(log_likelihood - log_sum_exp(log_likelihood, axis=0))
    return float(np.log1p(-(posterior * theta).sum() * excess).mean())
