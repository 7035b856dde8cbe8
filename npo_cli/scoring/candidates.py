"""The one estimator of Q, V and S = Q/V^alpha, for guide candidates and for AutoNPO's rollback distances.

A candidate is a weight per prompt and resample, a quality per prompt, and the moments of its importance ratios. The
weights are counts of a bootstrap over prompts for guides, and N_j/M_j times those counts within stratum j for rollback
distances. A resample has the same prompts for all candidates, so that a prompt's difficulty cancels in comparisons.
Axes: A candidates, P prompts, B bootstrap resamples (row 0 = the data as they are).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from npo_cli.scoring.quality import Floats, Interval, percentile_interval, smooth_quality, wilson
from npo_cli.scoring.variance import (
    HEAVY_TAILED,
    LARGEST_LOG,
    NO_KL_FLOOR,
    VARIANCE_ESTIMATORS,
    KLFloor,
    Moments,
    SampleRatio,
    SignalFormula,
    VarianceKind,
    compute_moments,
    estimate_kl_floor,
    log_variances,
    net_kl,
    pool_moments,
)
from npo_cli.scoring.weight_diagnostics import WeightDiagnostics, diagnose_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Importance ratios of one candidate's samples, summed per prompt: all that V and KL are computed from."""

    weights_BP: Floats
    moments: Moments
    """Of the samples behind V."""
    moments_all: Moments
    """Of all samples, correct and wrong, which an estimate of KL needs."""
    learner_moments: Moments | None
    """Of the learner's own samples on the same prompts: the KL floor. None: no floor."""
    diagnostics: WeightDiagnostics
    mean_length: float
    """Tokens per sample behind V."""

    def log_variance(self, formula: SignalFormula) -> Floats:
        """log V of every resample; one without a sample repeats row 0."""
        moments = pool_moments(self.moments, self.weights_BP)
        return _fill(log_variances(moments, formula, floor=self._floor(self.weights_BP, formula)))

    def interval(self, formula: SignalFormula) -> Interval:
        """95 % interval of V from all samples, correct and wrong."""
        return percentile_interval(np.exp(replace(self, moments=self.moments_all).log_variance(formula)))

    def variances(self, formula: SignalFormula) -> dict[VarianceKind, float]:
        """Every kind of V of the data as they are."""
        data = replace(self, weights_BP=self.weights_BP[:1])
        return {kind: float(np.exp(data.log_variance(formula.with_variance(kind))[0])) for kind in VARIANCE_ESTIMATORS}

    def kl(self, formula: SignalFormula) -> tuple[float, float]:
        """KL(guide || learner) per token and per sequence in nats, from all samples, the floor subtracted; >= 0."""
        data_1P = self.weights_BP[:1]
        kl = net_kl(pool_moments(self.moments_all, data_1P), self._floor(data_1P, formula), formula.settings.kl_average)
        return float(np.nan_to_num(kl[0][0])), float(np.nan_to_num(kl[1][0]))

    def _floor(self, weights_BP: Floats, formula: SignalFormula) -> KLFloor:
        if self.learner_moments is None:
            return NO_KL_FLOOR
        return estimate_kl_floor(pool_moments(self.learner_moments, weights_BP), formula.settings.kl_average)


def build_drift(
    samples: Sequence[SampleRatio],
    variance_samples: Sequence[SampleRatio],
    prompt_ids: Sequence[str],
    *,
    weights_BP: Floats,
    formula: SignalFormula,
    learner_moments: Moments | None = None,
) -> Drift | None:
    """Sum the samples per prompt; None without samples. `variance_samples`: those behind V."""
    if not samples:
        return None
    cap = formula.settings.weight_cap
    return Drift(
        weights_BP=weights_BP,
        moments=compute_moments(variance_samples, prompt_ids, cap=cap),
        moments_all=compute_moments(samples, prompt_ids, cap=cap),
        learner_moments=learner_moments,
        diagnostics=diagnose_weights(variance_samples),
        mean_length=sum(sample.num_tokens for sample in variance_samples) / max(1, len(variance_samples)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One guide or one rollback distance, ready to be resampled."""

    distance: int
    """Optimizer steps to the learner; the nearest of equals is chosen."""
    prompt_ids: tuple[str, ...]
    weights_BP: Floats
    """Weight of each prompt in each resample; 0 where the candidate was not sampled on it."""
    values_P: Floats
    """Quality on each prompt."""
    strata_P: NDArray[np.intp]
    """Stratum within which each prompt is resampled."""
    drift: Drift | None
    """None where no importance ratio is known: V = 1."""
    num_trials: float | None = None
    """M of the smoothed Q~; None: the number of prompts in each resample."""

    @property
    def covered_P(self) -> NDArray[np.bool_]:
        """Prompts on which the candidate was sampled."""
        return self.weights_BP[0] > 0

    def restrict(self, mask_P: NDArray[np.bool_]) -> "Candidate":
        """The candidate on these prompts alone."""
        drift = self.drift
        if drift is not None:
            drift = replace(drift, weights_BP=drift.weights_BP * mask_P)
        return replace(self, weights_BP=self.weights_BP * mask_P, drift=drift)

    def quality(self) -> Floats:
        """Q of every resample: the weighted mean of the prompts' qualities; one without a prompt repeats row 0."""
        with np.errstate(invalid="ignore"):
            return _fill(self.weights_BP @ self.values_P / self.weights_BP.sum(axis=1))

    def quality_interval(self) -> Interval:
        """95 % interval of Q; Wilson's with M = P where the prompts of every stratum agree.

        Resampling within strata then changes nothing, and the bootstrap interval would have zero width.
        """
        values_P, quality_B = self.values_P[self.covered_P], self.quality()
        strata_P = self.strata_P[self.covered_P]
        if any(np.ptp(values_P[strata_P == stratum]) > 0 for stratum in np.unique(strata_P)):
            return percentile_interval(quality_B)
        return wilson(float(quality_B[0]) * len(values_P), len(values_P))

    def log_variance(self, formula: SignalFormula) -> Floats:
        """log V of every resample."""
        return np.zeros(len(self.weights_BP)) if self.drift is None else self.drift.log_variance(formula)

    def log_quality(self) -> Floats:
        """log Q~ of every resample, Q~ = (M Q + 1/2)/(M + 1)."""
        num_trials = np.maximum(self.weights_BP.sum(axis=1), 1.0) if self.num_trials is None else self.num_trials
        return np.log(smooth_quality(self.quality(), num_trials))

    def log_signal(self, formula: SignalFormula) -> Floats:
        """log S = log Q~ - alpha log V of every resample."""
        return self.log_quality() - formula.settings.variance_exponent * self.log_variance(formula)

    def without_resamples(self) -> "Candidate":
        """The data as they are: row 0 alone."""
        drift = self.drift
        if drift is not None:
            drift = replace(drift, weights_BP=drift.weights_BP[:1])
        return replace(self, weights_BP=self.weights_BP[:1], drift=drift)


def estimate_signal(candidate: Candidate, formula: SignalFormula) -> dict[str, float]:
    """Q, V and S with 95 % intervals, by the field names of a score. S uses Q~, so it is not exactly Q/V^alpha."""
    quality_low, quality_high = candidate.quality_interval()
    log_variance_B = candidate.log_variance(formula)
    log_signal_B = candidate.log_quality() - formula.settings.variance_exponent * log_variance_B
    variance_B, signal_B = np.exp(log_variance_B), np.exp(np.clip(log_signal_B, -LARGEST_LOG, LARGEST_LOG))
    (variance_low, variance_high), (signal_low, signal_high) = map(percentile_interval, (variance_B, signal_B))
    return {
        "quality": float(candidate.quality()[0]),
        "quality_low": quality_low,
        "quality_high": quality_high,
        "variance": float(variance_B[0]),
        "variance_low": variance_low,
        "variance_high": variance_high,
        "signal": float(signal_B[0]),
        "signal_low": signal_low,
        "signal_high": signal_high,
    }


LogSignals = Callable[[Sequence[Candidate], SignalFormula], Floats]


def log_signals(candidates: Sequence[Candidate], formula: SignalFormula) -> Floats:
    """log_signal_BA, each candidate on its own prompts; -inf without importance ratios, unless all lack them."""
    log_signal_BA = np.stack([candidate.log_signal(formula) for candidate in candidates], axis=1)
    measured_A = np.array([candidate.drift is not None for candidate in candidates])
    return np.where(measured_A, log_signal_BA, -np.inf) if measured_A.any() else log_signal_BA


def paired_log_signals(candidates: Sequence[Candidate], formula: SignalFormula) -> Floats:
    """log_signal_BA of candidates that were not all sampled on the same prompts.

    A candidate dropped early is compared on the prompts it shares with ref, the best-covered candidate (of several,
    the one of largest S): log S_j = log S_ref + (log S_j - log S_ref on the shared prompts), so that easy or hard
    shared prompts cancel. Slices of a rollback differ by definition, not by missing samples, and are not paired.
    """
    log_signal_BA = log_signals(candidates, formula)
    covered_A = [int(candidate.covered_P.sum()) for candidate in candidates]
    widest = max(covered_A)
    ref = max((a for a, num in enumerate(covered_A) if num == widest), key=lambda a: log_signal_BA[0, a])
    reference = candidates[ref]
    for a, candidate in enumerate(candidates):
        shared_P = candidate.covered_P & reference.covered_P
        is_complete = covered_A[a] == widest == shared_P.sum()
        if is_complete or not shared_P.any() or candidate.drift is None or reference.drift is None:
            continue
        ahead_B = candidate.restrict(shared_P).log_signal(formula) - reference.restrict(shared_P).log_signal(formula)
        log_signal_BA[:, a] = log_signal_BA[:, ref] + ahead_B
    return log_signal_BA


def p_best(log_signal_BA: Floats) -> Floats:
    """Share of resamples (rows 1..) in which each candidate has the largest S, ties split; row 0 if there are none."""
    rows = log_signal_BA[1:] if len(log_signal_BA) > 1 else log_signal_BA
    wins = (rows >= rows.max(axis=1, keepdims=True) - 1e-12).astype(np.float64)
    return (wins / wins.sum(axis=1, keepdims=True)).mean(axis=0)


def argmax(log_signal_BA: Floats, distances: Sequence[int]) -> int:
    """Index of the candidate of largest S; of equals the nearest."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which candidate has the best S, by index, and how reliably."""

    index: int
    """Chosen by the settings' selection rule."""
    p_best_A: tuple[float, ...]
    by_profile: Mapping[str, int]
    """What each selection rule, and argmax under each other profile of V, chooses from the same samples."""
    by_variance_kind: Mapping[VarianceKind, tuple[int, tuple[float, ...]]]
    """Under each kind of V the index of the largest S, and p(best) of every candidate."""


def select_candidate(candidates: Sequence[Candidate], formula: SignalFormula, *, compare: LogSignals) -> Selection:
    """Choose by the settings' rule; report what other profiles and other kinds of V choose.

    `compare`: log_signals, or paired_log_signals where candidates may lack samples on some prompts.
    """
    distances = [candidate.distance for candidate in candidates]
    log_signal_BA = compare(candidates, formula)
    by_rule = {name: rule(log_signal_BA, distances) for name, rule in SELECTION_RULES.items()}
    profiles = {
        "faithful": formula.with_variance("kl_exp", kl_scale=1.0),
        "group2": formula.with_variance("group2"),
        "calibrated": formula.with_variance("kl_exp"),
        "seq_kl": formula.with_variance("seq2_lognormal"),
    }
    data = [candidate.without_resamples() for candidate in candidates]
    by_kind = {kind: compare(candidates, formula.with_variance(kind)) for kind in VARIANCE_ESTIMATORS}
    return Selection(
        index=by_rule[formula.settings.selection_rule],
        p_best_A=tuple(p_best(log_signal_BA).tolist()),
        by_profile={name: argmax(compare(data, other), distances) for name, other in profiles.items()} | by_rule,
        by_variance_kind={
            kind: (argmax(signals_BA, distances), tuple(p_best(signals_BA).tolist()))
            for kind, signals_BA in by_kind.items()
        },
    )


def trusted_formula(candidates: Sequence[Candidate], formula: SignalFormula) -> SignalFormula:
    """The formula, with seq2_lognormal in place of a heavy-tailed V that a few weights dominate for any candidate."""
    if formula.settings.variance in HEAVY_TAILED and any(
        candidate.drift.diagnostics.is_dominated for candidate in candidates if candidate.drift is not None
    ):
        return formula.with_variance("seq2_lognormal")
    return formula


def _fill(values_B: Floats) -> Floats:
    """Rows without data take row 0, the estimate from everything; 0 where that has none either."""
    return np.nan_to_num(np.where(np.isnan(values_B), values_B[0], values_B))
