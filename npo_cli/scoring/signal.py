"""The one estimator of Q, V and S = max(0, Q - Q_self)/V^alpha, for guide candidates and for AutoNPO's distances.

With `scoring.quality_baseline=none`, and where Q_self is not known, S = Q~/V^alpha as published. A candidate is a
weight per prompt and resample, a quality per prompt, and the moments of its importance ratios. The weights are counts
of a bootstrap over prompts for guides, and N_j/M_j times those counts within stratum j for rollback distances. A
resample has the same prompts for all candidates, so that a prompt's difficulty cancels in comparisons.
Axes: A candidates, P prompts, B bootstrap resamples (row 0 = the data as they are).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from npo_cli.scoring.quality import Floats, Interval, newcombe, percentile_interval, smooth_quality, wilson
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
    self_values_P: Floats | None = None
    """Quality of the learner's own second try on each prompt; None: it is not known, and not subtracted from Q."""
    is_learner: bool = False
    """"No guide": the learner's own second try, V = 1 by definition."""

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
        quality_B, num_prompts = self.quality(), int(self.covered_P.sum())
        if self._has_spread(self.values_P):
            return percentile_interval(quality_B)
        return wilson(float(quality_B[0]) * num_prompts, num_prompts)

    def net_quality(self) -> Floats:
        """Q - Q_self of every resample, both on the same prompts; Q where the learner has no second try."""
        if self.self_values_P is None:
            return self.quality()
        return replace(self, values_P=self.values_P - self.self_values_P).quality()

    def net_quality_interval(self) -> Interval:
        """95 % interval of Q - Q_self, paired: each resample has the same prompts for both.

        Newcombe's interval where the difference is the same on every prompt.
        """
        if self.is_learner or self.self_values_P is None:
            return (0.0, 0.0) if self.is_learner else self.quality_interval()
        if self._has_spread(self.values_P - self.self_values_P):
            return percentile_interval(self.net_quality())
        rate, net = float(self.quality()[0]), float(self.net_quality()[0])
        return newcombe(rate, min(1.0, rate - net), int(self.covered_P.sum()))

    def _has_spread(self, values_P: Floats) -> bool:
        """Whether resampling within strata can change the mean of these values."""
        values_P, strata_P = values_P[self.covered_P], self.strata_P[self.covered_P]
        return any(np.ptp(values_P[strata_P == stratum]) > 1e-12 for stratum in np.unique(strata_P))

    def log_variance(self, formula: SignalFormula) -> Floats:
        """log V of every resample."""
        return np.zeros(len(self.weights_BP)) if self.drift is None else self.drift.log_variance(formula)

    def numerator(self, formula: SignalFormula) -> Floats:
        """Q - Q_self of every resample, or Q if `scoring.quality_baseline` is none."""
        return self.net_quality() if self.is_net(formula) else self.quality()

    def numerator_interval(self, formula: SignalFormula) -> Interval:
        """Its 95 % interval."""
        return self.net_quality_interval() if self.is_net(formula) else self.quality_interval()

    def combine(self, numerator_B: Floats, log_variance_B: Floats, formula: SignalFormula) -> Floats:
        """log S of every resample: log max(0, Q - Q_self) - alpha log V, or log Q~ - alpha log V; -inf where S = 0.

        Q~ = (M Q + 1/2)/(M + 1). "No guide" has the smallest positive S instead of 0, and wins against guides with 0.
        """
        if self.is_net(formula):
            with np.errstate(divide="ignore"):
                log_quality_B = np.log(np.maximum(numerator_B, 0.0))
            log_quality_B = np.maximum(log_quality_B, -LARGEST_LOG) if self.is_learner else log_quality_B
        else:
            num_trials = np.maximum(self.weights_BP.sum(axis=1), 1.0) if self.num_trials is None else self.num_trials
            log_quality_B = np.log(smooth_quality(np.maximum(numerator_B, 0.0), num_trials))
        return log_quality_B - formula.settings.variance_exponent * log_variance_B

    def log_signal(self, formula: SignalFormula) -> Floats:
        """log S of every resample."""
        return self.combine(self.numerator(formula), self.log_variance(formula), formula)

    def is_net(self, formula: SignalFormula) -> bool:
        """Whether the learner's own second try is subtracted in S."""
        return formula.settings.quality_baseline == "learner" and self.self_values_P is not None

    def without_resamples(self) -> "Candidate":
        """The data as they are: row 0 alone."""
        drift = self.drift
        if drift is not None:
            drift = replace(drift, weights_BP=drift.weights_BP[:1])
        return replace(self, weights_BP=self.weights_BP[:1], drift=drift)


def estimate_signal(candidate: Candidate, formula: SignalFormula) -> dict[str, float]:
    """Q, V and S with 95 % intervals, by the field names of a score."""
    quality_low, quality_high = candidate.quality_interval()
    log_variance_B = candidate.log_variance(formula)
    log_signal_B = candidate.combine(candidate.numerator(formula), log_variance_B, formula)
    variance_B, signal_B = np.exp(log_variance_B), to_signals(log_signal_B)
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


def to_signals(log_signals_: Floats) -> Floats:
    """S from log S, finite; 0 for -inf."""
    return np.exp(np.minimum(log_signals_, LARGEST_LOG)) * (log_signals_ > -LARGEST_LOG)


LogSignals = Callable[[Sequence[Candidate], SignalFormula], Floats]


def log_signals(candidates: Sequence[Candidate], formula: SignalFormula) -> Floats:
    """log_signal_BA, each candidate on its own prompts; -inf without importance ratios, unless all lack them."""
    log_signal_BA = np.stack([candidate.log_signal(formula) for candidate in candidates], axis=1)
    measured_A = np.array([candidate.drift is not None or candidate.is_learner for candidate in candidates])
    return np.where(measured_A, log_signal_BA, -np.inf) if measured_A.any() else log_signal_BA


def paired_log_signals(candidates: Sequence[Candidate], formula: SignalFormula) -> Floats:
    """log_signal_BA of candidates that were not all sampled on the same prompts.

    A candidate dropped early is compared on the prompts it shares with ref, the best-covered candidate (of several,
    the one of largest S): its Q (net) is ref's plus the difference on the shared prompts, its log V likewise, so that
    easy or hard shared prompts cancel. Slices of a rollback differ by definition, not by missing samples, and are not
    paired.
    """
    log_signal_BA = log_signals(candidates, formula)
    guides = [a for a, candidate in enumerate(candidates) if candidate.drift is not None]
    if not guides:
        return log_signal_BA
    covered_A = [int(candidate.covered_P.sum()) for candidate in candidates]
    widest = max(covered_A[a] for a in guides)
    reference = candidates[max((a for a in guides if covered_A[a] == widest), key=lambda a: log_signal_BA[0, a])]
    for a in guides:
        candidate = candidates[a]
        shared_P = candidate.covered_P & reference.covered_P
        if covered_A[a] == widest == shared_P.sum() or not shared_P.any():
            continue
        own, ref = candidate.restrict(shared_P), reference.restrict(shared_P)
        numerator_B = reference.numerator(formula) + own.numerator(formula) - ref.numerator(formula)
        log_variance_B = reference.log_variance(formula) + own.log_variance(formula) - ref.log_variance(formula)
        log_signal_BA[:, a] = reference.combine(numerator_B, log_variance_B, formula)
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
    """The nearest candidate within one standard error of the best: S_best - S <= SE of that difference.

    The SE is paired (standard deviation over resamples of the difference), so without resamples this is argmax.
    """
    best = argmax(log_signal_BA, distances)
    possible = [a for a in range(log_signal_BA.shape[1]) if a == best or np.isfinite(log_signal_BA[0, a])]
    signal_BA = to_signals(log_signal_BA)
    behind_BA = signal_BA[:, [best]] - signal_BA[:, possible]
    error_A = behind_BA[1:].std(axis=0) if len(behind_BA) > 1 else np.zeros(len(possible))
    near_enough = [a for a, behind, error in zip(possible, behind_BA[0], error_A, strict=True) if behind <= error]
    return min(near_enough, key=lambda a: distances[a])


SELECTION_RULES: Mapping[str, Callable[[Floats, Sequence[int]], int]] = {"argmax": argmax, "one_se": one_se}
"""Rules on S; `value` needs a forecast instead (scoring/forecast.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which candidate is chosen, by index, and how reliably."""

    index: int
    """Chosen by the settings' selection rule; "no guide" if no guide is worth it."""
    p_best_A: tuple[float, ...]
    by_profile: Mapping[str, int]
    """What each selection rule, and argmax under each other profile, chooses from the same samples."""
    by_variance_kind: Mapping[VarianceKind, tuple[int, tuple[float, ...]]]
    """Under each kind of V the index of the largest S, and p(best) of every candidate."""


def is_worthwhile(candidate: Candidate) -> bool:
    """Whether it may be selected: the paired 95 % interval of Q - Q_self is above 0. Where Q_self is not known, always;
    "no guide" always."""
    return candidate.is_learner or candidate.self_values_P is None or candidate.net_quality_interval()[0] > 0


def select_candidate(
    candidates: Sequence[Candidate],
    formula: SignalFormula,
    *,
    compare: LogSignals,
    values: Sequence[float | None] | None = None,
) -> Selection:
    """Choose by the settings' rule among the worthwhile candidates; report what other profiles and kinds of V choose.

    `compare`: log_signals, or paired_log_signals where candidates may lack samples on some prompts. `values`: steps
    saved per cost of each candidate, for the rule `value`: the largest, if it is at least 1; else "no guide".
    """
    distances = [candidate.distance for candidate in candidates]
    worthwhile = [a for a, candidate in enumerate(candidates) if is_worthwhile(candidate)]

    def choose(log_signal_BA: Floats, rule: str = "argmax") -> int:
        chosen = SELECTION_RULES[rule](log_signal_BA[:, worthwhile], [distances[a] for a in worthwhile])
        return worthwhile[chosen]

    log_signal_BA = compare(candidates, formula)
    by_rule = {rule: choose(log_signal_BA, rule) for rule in SELECTION_RULES}
    if values is not None:
        by_rule["value"] = _largest_value(candidates, worthwhile, values)
    data = [candidate.without_resamples() for candidate in candidates]
    by_kind = {kind: compare(candidates, formula.with_variance(kind)) for kind in VARIANCE_ESTIMATORS}
    return Selection(
        index=by_rule[formula.settings.selection_rule],
        p_best_A=tuple(p_best(log_signal_BA).tolist()),
        by_profile={name: choose(compare(data, other)) for name, other in profile_formulas(formula).items()} | by_rule,
        by_variance_kind={
            kind: (argmax(signals_BA, distances), tuple(p_best(signals_BA).tolist()))
            for kind, signals_BA in by_kind.items()
        },
    )


def profile_formulas(formula: SignalFormula) -> dict[str, SignalFormula]:
    """The formulas of S whose choice is reported beside the settings' own."""
    return {
        "faithful": formula.with_variance("kl_exp", kl_scale=1.0, quality_baseline="none"),
        "group2": formula.with_variance("group2"),
        "calibrated": formula.with_variance("kl_exp"),
        "seq_kl": formula.with_variance("seq2_lognormal"),
    }


def _largest_value(candidates: Sequence[Candidate], worthwhile: Sequence[int], values: Sequence[float | None]) -> int:
    """The worthwhile guide with the largest value of at least 1, of equals the nearest; else "no guide"."""
    paying = [a for a in worthwhile if (values[a] or 0.0) >= 1.0]
    if paying:
        return min(paying, key=lambda a: (-(values[a] or 0.0), candidates[a].distance))
    return next(a for a, candidate in enumerate(candidates) if candidate.is_learner)


def split_quality_net(candidates: Sequence[Candidate], formula: SignalFormula, *, compare: LogSignals) -> float | None:
    """Q - Q_self of the largest S, on prompts that did not choose it; None with fewer than two prompts.

    Each half of the prompts (every other one) chooses among the guides, the other half measures the choice; the two
    are averaged. The Q of a choice on the prompts that made it is too high: the largest of several noisy figures.
    """
    guides = [one.without_resamples() for one in candidates if not one.is_learner]
    covered_P = np.logical_and.reduce([one.covered_P for one in guides]) if guides else np.zeros(0, dtype=bool)
    if covered_P.sum() < 2:
        return None
    rank_P = np.cumsum(covered_P) - 1
    halves = [covered_P & (rank_P % 2 == half) for half in (0, 1)]
    measured = []
    for chooses_P, measures_P in (halves, halves[::-1]):
        signal_BA = compare([one.restrict(chooses_P) for one in guides], formula)
        chosen = guides[argmax(signal_BA, [one.distance for one in guides])]
        measured.append(float(chosen.restrict(measures_P).net_quality()[0]))
    return sum(measured) / 2


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
