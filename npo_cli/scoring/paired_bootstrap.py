"""Candidates side by side on the same prompts: log S of every candidate in every resample.

A resample draws prompts, and every candidate gets the same draw: what makes a prompt hard for all of them cancels
in the comparison. Axes: A candidates, P prompts (of any candidate), B rows of prompt counts (row 0 = the data).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from npo_cli.scoring.quality import Floats, smooth_quality
from npo_cli.scoring.variance import (
    KLFloor,
    Moments,
    VarianceKind,
    VarianceKnobs,
    estimate_kl_floor,
    log_variances,
    pool_moments,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalFormula:
    """How Q and V become one number."""

    variance: VarianceKind
    knobs: VarianceKnobs
    alpha: float
    """Exponent of V."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One guide's evidence, summed per prompt."""

    covered_P: Floats
    """1 where it answered the prompt, 0 where it was not asked."""
    values_P: Floats
    """Its quality on each prompt, 0 where it was not asked."""
    moments: Moments
    """Of the samples behind V; one row a prompt."""

    @property
    def has_samples(self) -> bool:
        """Whether there is any sample to estimate V from."""
        return bool(self.moments.samples.sum() > 0)

    @property
    def num_prompts(self) -> int:
        return int(self.covered_P.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalResamples:
    """Q, log V and log S of one candidate, a row a resample."""

    quality_B: Floats
    log_variance_B: Floats
    log_signal_B: Floats


def resample_signal(
    candidate: Candidate, counts_BP: Floats, *, learner_moments: Moments, formula: SignalFormula
) -> SignalResamples:
    """log S = log Q~ - alpha log V.

    A resample that misses the candidate altogether repeats row 0; V = 1 where nothing was measured.
    """
    asked_B = counts_BP @ candidate.covered_P
    with np.errstate(invalid="ignore"):
        quality_B = _filled(counts_BP @ (candidate.values_P * candidate.covered_P) / asked_B)
    floor = estimate_kl_floor(pool_moments(learner_moments, counts_BP), formula.knobs.average)
    log_variance_B = _filled(_log_variance(pool_moments(candidate.moments, counts_BP), floor, formula))
    # Q~ follows the number of prompts, which a resample of a partly asked candidate changes.
    log_quality_B = np.log(smooth_quality(quality_B, np.maximum(asked_B, 1.0)))
    return SignalResamples(
        quality_B=quality_B,
        log_variance_B=log_variance_B,
        log_signal_B=log_quality_B - formula.alpha * log_variance_B,
    )


def paired_log_signals(
    candidates: Sequence[Candidate], counts_BP: Floats, *, learner_moments: Moments, formula: SignalFormula
) -> Floats:
    """log_signal_BA, comparable between candidates that were not asked the same prompts.

    One dropped early is compared on the prompts it shares with the best-covered candidate, ref (of several, the one
    of largest S): log S_j = log S_ref + (log S_j - log S_ref on the shared prompts). Luck with the shared prompts
    cancels. A candidate without a measured V gets -inf, unless nobody has one.
    """

    def log_signal(candidate: Candidate, mask_P: Floats) -> Floats:
        return resample_signal(
            candidate, counts_BP * mask_P, learner_moments=learner_moments, formula=formula
        ).log_signal_B

    own_BA = np.stack([log_signal(candidate, candidate.covered_P) for candidate in candidates], axis=1)
    measured_A = np.array([candidate.has_samples for candidate in candidates])
    if measured_A.any():
        own_BA = np.where(measured_A, own_BA, -np.inf)
    widest = max(candidate.num_prompts for candidate in candidates)
    ref = max(
        (a for a, candidate in enumerate(candidates) if candidate.num_prompts == widest), key=lambda a: own_BA[0, a]
    )
    for a, candidate in enumerate(candidates):
        shared_P = candidate.covered_P * candidates[ref].covered_P
        if candidate.num_prompts == widest == shared_P.sum() or not (shared_P.any() and measured_A[[a, ref]].all()):
            continue
        ahead_B = log_signal(candidate, shared_P) - log_signal(candidates[ref], shared_P)
        own_BA[:, a] = own_BA[:, ref] + ahead_B
    return own_BA


def p_best(log_signal_BA: Floats) -> Floats:
    """Share of resamples (rows 1..) in which each candidate has the largest S, ties split; row 0 if there are none."""
    rows = log_signal_BA[1:] if len(log_signal_BA) > 1 else log_signal_BA
    wins = (rows >= rows.max(axis=1, keepdims=True) - 1e-12).astype(np.float64)
    return (wins / wins.sum(axis=1, keepdims=True)).mean(axis=0)


def argmax(log_signal_BA: Floats, distances: Sequence[int]) -> int:
    """Place of the candidate of largest S; of equals the nearest."""
    best = log_signal_BA[0].max()
    return min(np.flatnonzero(log_signal_BA[0] >= best - 1e-12).tolist(), key=lambda a: distances[a])


def one_se(log_signal_BA: Floats, distances: Sequence[int]) -> int:
    """The nearest candidate within one standard error of the best: log S_best - log S <= SE of that difference.

    The SE is paired (standard deviation over resamples of the difference), so without resamples this is argmax.
    """
    best = argmax(log_signal_BA, distances)
    possible = [a for a in range(log_signal_BA.shape[1]) if np.isfinite(log_signal_BA[0, a])]
    behind_BA = log_signal_BA[:, [best]] - log_signal_BA[:, possible]
    error_A = behind_BA[1:].std(axis=0) if len(behind_BA) > 1 else np.zeros(len(possible))
    near_enough = [a for a, behind, error in zip(possible, behind_BA[0], error_A, strict=True) if behind <= error]
    return min(near_enough, key=lambda a: distances[a])


SELECTION_RULES: Mapping[str, Callable[[Floats, Sequence[int]], int]] = {"argmax": argmax, "one_se": one_se}


def _log_variance(moments: Moments, floor: KLFloor, ranking: SignalFormula) -> Floats:
    return log_variances(moments, kind=ranking.variance, floor=floor, knobs=ranking.knobs)


def _filled(values_B: Floats) -> Floats:
    """Rows without data take row 0, the estimate from everything; 0 where that has none either."""
    return np.nan_to_num(np.where(np.isnan(values_B), values_B[0], values_B))
