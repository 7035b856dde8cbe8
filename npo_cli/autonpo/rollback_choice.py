"""How far to roll back: Q, V, S and the forecast of every distance from one probe of failed prompts; choose, accept.

The estimator is that of guide candidates (scoring/signal.py). Here the candidates are nested slices, all prompts
that failed within the last D steps; a slice consists of strata of age, and a prompt of a stratum of N_j failed prompts,
M_j of them probed, has the weight N_j/M_j. V is estimated from both sides, which the mathematics allows for kinds
made of a KL only (BIDIRECTIONAL_KINDS):
  forward: samples of the current policy b, scored by the old checkpoint a, log w = log a - log b;
  backward: recorded rollouts of the old policy, scored by the current one, log w = log b - log a, so that the same
  code gives exp(KL(a||b)). Its squares would be those of b/a, another quantity, and are not used.
Q is net of the old policy's own second try, estimated from the same samples by importance weighting. The choice is
measured on samples that did not make it, and a probe may stop early (`sequential_test.py`).
Axes: A candidates (distances that have a checkpoint), P probed prompts (by stratum), N samples, B bootstrap resamples
(row 0 = the data as they are).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from npo_cli.autonpo.sequential_test import MIN_POWER, ONLY_LOOK, Look, conditional_power, critical_value
from npo_cli.config.autonpo import AutonpoSettings
from npo_cli.scoring.forecast import Forecast, ReplaySegment, expect_guide_tokens, forecast_replay
from npo_cli.scoring.quality import (
    Z_95,
    Floats,
    Interval,
    PromptPassCount,
    bootstrap_counts,
    effective_trials,
    intraclass_correlation,
    jeffreys,
    newcombe,
    percentile_interval,
    wilson,
)
from npo_cli.scoring.signal import (
    SELECTION_RULES,
    Candidate,
    Drift,
    build_drift,
    estimate_signal,
    log_signals,
    p_best,
    profile_formulas,
    trusted_formula,
)
from npo_cli.scoring.variance import SampleRatio, SignalFormula, VarianceKind, log_sum_exp
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES, select_variance_samples
from npo_cli.seeds import derive_seed
from npo_cli.types.autonpo import FailedPrompt, ProbeResult, ProbeStop, RollbackScore, StratumQuality

BIDIRECTIONAL_KINDS: tuple[VarianceKind, ...] = ("kl_exp", "seq2_lognormal", "group2")
"""Kinds of V made of a KL, which samples of either policy estimate. A mean square of w = a/b under b is not that of
b/a under a, so the other kinds have no backward estimate."""
MIN_PROMPTS_PER_STRATUM = 4
"""Minimum number of prompts probed per stratum."""
PUBLISHED_MIN_QUALITY = 0.1
"""Lower bound of Q that accepts where nothing is subtracted from it and autonpo.probe.min_quality is null."""
MIN_EFFECTIVE_SAMPLES = 64
STANDARD_ERRORS = 2.0
ROUNDING = 1e-9


# Strata of failed prompts by age. Axes: J strata, youngest first.


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """Distinct prompts whose newest failure, at step s, has an age of min_age <= t - s < max_age."""

    min_age: int
    """Steps."""
    max_age: int
    """Steps: the smallest rollback that replays all of these failures."""
    prompt_ids: tuple[str, ...]
    """Newest failure first."""


def stratify_failed_prompts(
    pool: Sequence[FailedPrompt], *, step: int, distances: Sequence[int], max_accuracy: float
) -> tuple[Stratum, ...]:
    """Failures with accuracy <= max_accuracy by age at `step`, one stratum per distance, ascending, possibly empty.

    A prompt has the age of its newest failure. Failures after `step`, or older than every distance, are left out.
    """
    newest: dict[str, int] = {}
    for failure in pool:
        if failure.accuracy <= max_accuracy and failure.step <= step:
            newest[failure.prompt_id] = max(failure.step, newest.get(failure.prompt_id, failure.step))
    ordered = sorted(newest.items(), key=lambda item: -item[1])
    return tuple(
        Stratum(
            min_age=min_age,
            max_age=max_age,
            prompt_ids=tuple(prompt_id for prompt_id, failed_at in ordered if min_age <= step - failed_at < max_age),
        )
        for min_age, max_age in itertools.pairwise([0, *sorted(set(distances))])
    )


def allocate_probe_prompts(strata: Sequence[Stratum], *, num_prompts: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """`num_prompts` of all strata in proportion to their size N_j, a few of every stratum; all of them if they fit.

    Not by N_j sqrt(q_j (1 - q_j)) with q_j of a first half (Neyman 1934): strata that were unlucky in it would get
    fewer samples and stay low, which biased Q by up to a tenth (`docs/explanation/autonpo.md`, Probe).
    """
    sizes_J = [len(stratum.prompt_ids) for stratum in strata]
    counts_J = _allot(num_prompts, sizes_J, room_J=sizes_J, least=MIN_PROMPTS_PER_STRATUM)
    return tuple(_shuffle(stratum.prompt_ids, seed)[:count] for stratum, count in zip(strata, counts_J, strict=True))


def _shuffle(prompt_ids: Sequence[str], seed: int) -> tuple[str, ...]:
    """A random order that depends on the seed and the ids alone."""
    return tuple(sorted(prompt_ids, key=lambda prompt_id: derive_seed(seed, prompt_id)))


def _allot(budget: int, weights_J: Sequence[float], *, room_J: Sequence[int], least: int) -> list[int]:
    """Prompts per stratum, given out one by one to the stratum with room and the largest w_j/(n_j + 1/2) (Webster).

    Strata below `least` come first; ties go to the youngest. Less than `budget` only if all strata are full.
    """
    counts_J = [0] * len(room_J)
    for _ in range(min(budget, sum(room_J))):
        open_J = [j for j, room in enumerate(room_J) if counts_J[j] < room]
        chosen = max(open_J, key=lambda j: (counts_J[j] < least, weights_J[j] / (counts_J[j] + 0.5)))
        counts_J[chosen] += 1
    return counts_J


# Choosing a distance


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftSamples:
    """The samples that tell how far one stored checkpoint is from the current policy."""

    distance: int
    """Steps back."""
    forward: Sequence[SampleRatio]
    """The current policy's samples of the slice's probed prompts; log_w = log a - log b."""
    backward: Sequence[SampleRatio]
    """The old policy's recorded samples of failed prompts, probed or not; log_w = log b - log a."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackCandidate:
    """One distance: the candidate of the shared estimator, the drift estimated from either side, and the forecast."""

    samples: DriftSamples
    candidate: Candidate
    """Its drift is the one that enters S."""
    forward: Drift | None
    backward: Drift | None
    num_failed_prompts: int
    """Failed prompts of the slice, probed or not."""
    forecast: Forecast | None
    """None where the run has no record of the steps to replay."""

    @property
    def distance(self) -> int:
        return self.samples.distance

    @property
    def value(self) -> float:
        """Steps saved per step of cost; -inf where it cannot be forecast."""
        return -math.inf if self.forecast is None else self.forecast.value


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMeasurement:
    """Each half of the probe chooses a distance and the other half measures it: the mean of the two.

    The Q of a choice on the samples that made it is too high: the largest of several noisy figures.
    """

    quality: float
    """Q net of the old policy, or Q with scoring.quality_baseline=none."""
    low: float
    high: float
    """At the error level of the look, one-sided on either side."""
    value: float | None
    """Steps saved per step of cost."""


def choose_rollback(
    strata: Sequence[Stratum],
    probed: Sequence[PromptPassCount],
    samples: Sequence[DriftSamples],
    *,
    segments: Mapping[int, ReplaySegment],
    formula: SignalFormula,
    settings: AutonpoSettings,
    seed: int,
    num_tokens: int,
    look: Look = ONLY_LOOK,
) -> ProbeResult:
    """Choose D* by autonpo.rollback.selection_rule; accept it by its Q and its forecast; say whether to sample on.

    Accepted: the lower bound of Q (net) on samples that did not choose is above the limit (`least_quality`), and the
    forecast there is at least autonpo.rollback.min_value. Prompts are resampled within strata, jointly for all
    distances. A distance without a probed prompt has no score. `segments`: the replay of each distance.
    """
    build = RollbackEstimator(
        strata=strata,
        samples=samples,
        segments=segments,
        formula=formula,
        settings=settings,
        seed=seed,
        num_tokens=num_tokens,
        num_samples=sum(count.num_samples for count in probed),
    )
    candidates = build.candidates(probed)
    used = trusted_formula([each.candidate for each in candidates], formula)
    # Only distances with enough failed prompts can be chosen.
    eligible = [each for each in candidates if each.num_failed_prompts >= settings.rollback.min_failed_prompts]
    chosen, split, reason, stop = decide(build, probed, eligible, formula=used, look=look)
    by_profile = choose_by_profile(eligible, used) if eligible else {}
    return ProbeResult(
        is_accepted=stop == "success",
        reason=reason,
        distance=None if chosen is None else chosen.distance,
        strata=tuple(estimate_stratum_quality(stratum, probed) for stratum in strata),
        scores=_score_all(candidates, eligible, chosen, used),
        selection_by_profile=by_profile,
        num_prompts=len(probed),
        num_samples=build.num_samples,
        num_tokens=num_tokens,
        stop=stop,
        level=look.level,
        quality_split=None if split is None else split.quality,
        quality_split_low=None if split is None else split.low,
        quality_split_high=None if split is None else split.high,
        value_split=None if split is None else split.value,
    )


def decide(
    build: "RollbackEstimator",
    probed: Sequence[PromptPassCount],
    eligible: Sequence[RollbackCandidate],
    *,
    formula: SignalFormula,
    look: Look,
) -> tuple[RollbackCandidate | None, SplitMeasurement | None, str, ProbeStop | None]:
    """The chosen distance, its measurement, why it is rejected (empty: accepted), and why sampling ends (None: not)."""
    settings, chosen, split = build.settings, None, None
    if eligible:
        chosen = eligible[choose_distance(eligible, settings.rollback.selection_rule, formula)]
        split = measure_split(build, probed, formula=formula, level=look.level)
    reason = _rejection_reason(build, chosen, split, formula)
    if not reason and (look.is_last or is_well_weighted(chosen, formula)):
        return chosen, split, "", "success"
    if look.is_last:
        return chosen, split, reason, "complete"
    is_futile_everywhere = bool(reason) and all(is_futile(each, look, formula, settings) for each in eligible)
    return chosen, split, reason, "futility" if is_futile_everywhere else None


def weigh_samples(each: RollbackCandidate, formula: SignalFormula) -> tuple[Floats, NDArray[np.bool_]]:
    """Capped weights of the slice's samples, and which of them are correct."""
    inside = frozenset(each.candidate.prompt_ids)
    own = [sample for sample in each.samples.forward if sample.prompt_id in inside]
    log_w_N = np.array([sample.log_w for sample in own], dtype=np.float64)
    weight_N = np.exp(np.minimum(log_w_N, math.log(formula.settings.weight_cap)))
    return weight_N, np.array([sample.is_correct for sample in own], dtype=bool)


def is_well_weighted(chosen: RollbackCandidate | None, formula: SignalFormula) -> bool:
    """Whether Q_self rests on enough samples for an early acceptance: (sum w)^2/sum w^2 of the correct ones, at least
    64. With fewer, its interval misses far more often than the small error of an early look. Always, without Q_self."""
    if chosen is None or not chosen.candidate.is_net(formula):
        return chosen is not None
    all_N, is_correct_N = weigh_samples(chosen, formula)
    weight_N = all_N[is_correct_N]
    return bool(weight_N.sum() ** 2 >= MIN_EFFECTIVE_SAMPLES * (weight_N**2).sum() > 0)


def reject_small_pool(
    strata: Sequence[Stratum], distances: Sequence[int], settings: AutonpoSettings
) -> ProbeResult | None:
    """The rejection of a probe that no distance could pass, before anything is sampled; None if one could."""
    reason = _pool_reason(strata, distances, settings)
    if not reason:
        return None
    unprobed = tuple(estimate_stratum_quality(stratum, ()) for stratum in strata)
    return ProbeResult(is_accepted=False, reason=reason, distance=None, strata=unprobed, scores=(), stop="unsampled")


def choose_distance(eligible: Sequence[RollbackCandidate], rule: str, formula: SignalFormula) -> int:
    """Index by the rule: `value`, of equals the nearest; without any forecast, and by other rules, from S."""
    if rule == "value" and any(each.forecast is not None for each in eligible):
        return min(range(len(eligible)), key=lambda a: (-eligible[a].value, eligible[a].distance))
    signal_BA = log_signals([each.candidate for each in eligible], formula)
    return SELECTION_RULES["argmax" if rule == "value" else rule](signal_BA, [each.distance for each in eligible])


def choose_by_profile(eligible: Sequence[RollbackCandidate], formula: SignalFormula) -> dict[str, int]:
    """The distance that each rule, and the largest S under each other profile, would choose."""
    data = [replace(each, candidate=each.candidate.without_resamples()) for each in eligible]
    found = {name: choose_distance(data, "argmax", other) for name, other in profile_formulas(formula).items()}
    found |= {rule: choose_distance(eligible, rule, formula) for rule in ("value", *SELECTION_RULES)}
    return {name: eligible[place].distance for name, place in found.items()}


def least_quality(candidate: Candidate, formula: SignalFormula, settings: AutonpoSettings) -> float:
    """The limit that the lower bound must exceed (net) or reach (published Q)."""
    is_net = candidate.is_net(formula)
    if settings.probe.min_quality is None:
        return 0.0 if is_net else PUBLISHED_MIN_QUALITY
    return settings.probe.min_quality


def is_futile(each: RollbackCandidate, look: Look, formula: SignalFormula, settings: AutonpoSettings) -> bool:
    """Whether going on to sample would hardly accept this distance: its conditional power is below 0.1, or even the
    upper bound of its forecast is below autonpo.rollback.min_value."""
    least_value = settings.rollback.min_value
    if least_value > 0 and (each.forecast is None or each.forecast.value_high < least_value):
        return True
    low, high = each.candidate.numerator_interval(formula)
    estimate, error = float(each.candidate.numerator(formula)[0]), (high - low) / (2 * Z_95)
    limit = least_quality(each.candidate, formula, settings)
    return conditional_power(estimate, error, limit=limit, look=look) < MIN_POWER


# The choice is measured on samples that did not make it


def measure_split(
    build: "RollbackEstimator", probed: Sequence[PromptPassCount], *, formula: SignalFormula, level: float
) -> SplitMeasurement | None:
    """Cross-fitted over two halves of the probe, every other prompt of the strata in turn.

    None if a half has no eligible distance, or does not have the one that the other half chose.
    """
    ordered = [count for stratum in build.strata for count in _probed_within(stratum, probed)]
    least, rule = build.settings.rollback.min_failed_prompts, build.settings.rollback.selection_rule
    found = [build.candidates(ordered[half::2], has_drift=rule != "value" or not build.segments) for half in (0, 1)]
    halves = [{each.distance: each for each in half if each.num_failed_prompts >= least} for half in found]
    measured = []
    for choosing, measuring in (halves, halves[::-1]):
        if not choosing:
            return None
        own = list(choosing.values())
        distance = own[choose_distance(own, rule, formula)].distance
        if distance not in measuring:
            return None
        measured.append(measuring[distance])
    candidates = [each.candidate for each in measured]
    quality_B = np.mean([one.numerator(formula) for one in candidates], axis=0)
    num_prompts = sum(len(one.values_P) for one in candidates)
    rate = float(np.mean([one.quality()[0] for one in candidates]))
    low, high = _bounds(quality_B, rate, num_prompts, level=level)
    if candidates[0].is_net(formula):
        # A tail that was not sampled: as if one more sample had been correct with the largest weight.
        num_samples = sum(len(weigh_samples(each, formula)[0]) for each in measured)
        low -= formula.settings.weight_cap / num_samples
    has_value = all(each.forecast is not None for each in measured)
    return SplitMeasurement(
        quality=float(quality_B[0]),
        low=low,
        high=high,
        value=float(np.mean([each.value for each in measured])) if has_value else None,
    )


def _bounds(quality_B: Floats, rate: float, num_prompts: int, *, level: float) -> Interval:
    """Percentiles at one-sided error `level`; where resampling changes nothing, Newcombe's or Wilson's interval."""
    if np.ptp(quality_B) > ROUNDING:
        return percentile_interval(quality_B, level)
    z, other = critical_value(level), rate - float(quality_B[0])
    if other > ROUNDING:
        return newcombe(rate, min(1.0, other), num_prompts, z)
    return wilson(rate * num_prompts, num_prompts, z)


# Quality of a slice, from its strata


def resample_strata(
    strata: Sequence[Stratum], probed: Sequence[PromptPassCount], *, rng: np.random.Generator, resamples: int
) -> Candidate:
    """All probed prompts, resampled within each stratum.

    A weight is the count in the resample times N_j/M_j, so that every row of a stratum sums to N_j. A stratum without
    a probed prompt has no part. The candidate is the slice of all strata; `slice_within` cuts the others from it.
    """
    counts_J = [(stratum, _probed_within(stratum, probed)) for stratum in strata]
    counts_J = [(stratum, counts) for stratum, counts in counts_J if counts]
    counts_P = [count for _, counts in counts_J for count in counts]
    assert len(counts_P) == len(probed), "probed prompts are failed prompts of the strata"
    assert len({count.prompt_id for count in probed}) == len(probed), "one count per prompt"
    blocks = [
        bootstrap_counts(len(counts), rng, resamples) * (len(stratum.prompt_ids) / len(counts))
        for stratum, counts in counts_J
    ]
    return Candidate(
        prompt_ids=tuple(count.prompt_id for count in counts_P),
        distance=max((stratum.max_age for stratum in strata), default=0),
        weights_BP=np.hstack([np.zeros((1 + resamples, 0)), *blocks]),
        values_P=np.array([count.num_correct / count.num_samples for count in counts_P]),
        drift=None,
        strata_P=np.array([stratum.max_age for stratum, counts in counts_J for _ in counts], dtype=np.intp),
        # The prompts of the whole probe: with those of the slice, smoothing would favour slices with few of them.
        num_trials=len(probed),
    )


def slice_within(everything: Candidate, distance: int) -> Candidate:
    """The slice of one distance: its quality is sum_j N_j q_j / sum_j N_j over the strata up to it."""
    inside_P: NDArray[np.bool_] = everything.strata_P <= distance
    return replace(
        everything,
        distance=distance,
        prompt_ids=tuple(itertools.compress(everything.prompt_ids, inside_P)),
        weights_BP=everything.weights_BP[:, inside_P],
        values_P=everything.values_P[inside_P],
        strata_P=everything.strata_P[inside_P],
    )


def estimate_second_try(part: Candidate, forward: Sequence[SampleRatio], *, cap: float) -> Floats | None:
    """Pass rate of the old policy a on each probed prompt, from samples of the current policy b; None without any.

    (1/k) sum_i min(w_i, C) 1[correct_i], w = a/b of the whole response. The cap C (scoring.weight_cap) takes weight
    away, and Q - Q_self would be too large: where the slice's mean weight is below its expectation E_b[w] = 1, all are
    divided by it. An average above 1 is left as it is, so that Q_self errs to the large side.
    """
    column = {prompt_id: place for place, prompt_id in enumerate(part.prompt_ids)}
    inside = [sample for sample in forward if sample.prompt_id in column]
    if not inside:
        return None
    place_N = np.array([column[sample.prompt_id] for sample in inside])
    weight_N = np.exp(np.minimum([sample.log_w for sample in inside], math.log(cap)))
    correct_N = np.array([sample.is_correct for sample in inside], dtype=np.float64)
    num_P = np.maximum(1, np.bincount(place_N, minlength=len(column)))
    mean_P = np.bincount(place_N, weights=weight_N, minlength=len(column)) / num_P
    self_P = np.bincount(place_N, weights=weight_N * correct_N, minlength=len(column)) / num_P
    strata_P = part.weights_BP[0]
    mean_weight = float(strata_P @ mean_P / strata_P.sum())
    return self_P / min(1.0, max(mean_weight, 1.0 / cap))


def count_failed_prompts(strata: Sequence[Stratum], distance: int) -> int:
    """Distinct failed prompts that a rollback of this distance revisits."""
    return sum(len(stratum.prompt_ids) for stratum in strata if stratum.max_age <= distance)


def estimate_stratum_quality(stratum: Stratum, probed: Sequence[PromptPassCount]) -> StratumQuality:
    """q_j with Jeffreys' interval of as many trials as the clustered samples are worth; 0 in [0, 1] if unprobed."""
    counts = _probed_within(stratum, probed)
    correct_P = np.array([count.num_correct for count in counts], dtype=np.float64)
    samples_P = np.array([count.num_samples for count in counts], dtype=np.float64)
    quality, trials = 0.0, 0.0
    if counts:
        quality = float((correct_P / samples_P).mean())
        icc = intraclass_correlation(correct_P, samples_P)
        trials = effective_trials(len(counts), float(samples_P.mean()), icc)
    low, high = jeffreys(quality * trials, trials)
    return StratumQuality(
        min_age=stratum.min_age,
        max_age=stratum.max_age,
        num_failed_prompts=len(stratum.prompt_ids),
        num_probed=len(counts),
        num_samples=int(samples_P.sum()),
        num_correct=int(correct_P.sum()),
        quality=quality,
        quality_low=min(low, quality),
        quality_high=max(high, quality),
    )


def _probed_within(stratum: Stratum, probed: Sequence[PromptPassCount]) -> list[PromptPassCount]:
    prompt_ids = frozenset(stratum.prompt_ids)
    return [count for count in probed if count.prompt_id in prompt_ids]


# Drift, from both sides


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackEstimator:
    """Everything that makes candidates of probed prompts: of the whole probe, or of a half of it."""

    strata: Sequence[Stratum]
    samples: Sequence[DriftSamples]
    segments: Mapping[int, ReplaySegment]
    formula: SignalFormula
    settings: AutonpoSettings
    seed: int = 0
    num_tokens: int = 0
    num_samples: int = 0
    """Of the whole probe."""

    def candidates(self, probed: Sequence[PromptPassCount], *, has_drift: bool = True) -> list[RollbackCandidate]:
        """Every distance with a probed prompt, nearest first, ready to be resampled; without drift V = 1."""
        assert {each.distance for each in self.samples} <= {one.max_age for one in self.strata}, "slices end at strata"
        assert len({each.distance for each in self.samples}) == len(self.samples), "one set of samples per distance"
        rng, cap = np.random.default_rng(self.seed), self.formula.settings.weight_cap
        resamples = self.formula.settings.bootstrap_resamples
        everything = resample_strata(self.strata, probed, rng=rng, resamples=resamples)
        ordered = sorted(self.samples, key=lambda own: own.distance)
        pairs = [(each, slice_within(everything, each.distance)) for each in ordered]
        pairs = [(each, part) for each, part in pairs if len(part.values_P)]
        parts = [replace(part, self_values_P=estimate_second_try(part, each.forward, cap=cap)) for each, part in pairs]
        own_samples = [each for each, _ in pairs]
        forward = backward = [None] * len(parts)
        if has_drift:
            forward = estimate_forward_drift(own_samples, parts, formula=self.formula)
            backward = estimate_backward_drift(own_samples, rng=rng, formula=self.formula)
        source = self.settings.probe.variance_samples
        return [
            RollbackCandidate(
                samples=each,
                candidate=replace(part, drift=select_drift(ahead, behind, source)),
                forward=ahead,
                backward=behind,
                num_failed_prompts=count_failed_prompts(self.strata, each.distance),
                forecast=self.forecast(part, probed),
            )
            for each, part, ahead, behind in zip(own_samples, parts, forward, backward, strict=True)
        ]

    def forecast(self, part: Candidate, probed: Sequence[PromptPassCount]) -> Forecast | None:
        """Steps saved and their price, the probe's tokens among it; None without a record of the steps."""
        segment = self.segments.get(part.distance)
        if segment is None:
            return None
        inside = frozenset(part.prompt_ids)
        counts = [count for count in probed if count.prompt_id in inside]
        tokens = expect_guide_tokens(counts, segment, tokens_per_sample=self.num_tokens / max(1, self.num_samples))
        net, interval = float(part.net_quality()[0]), part.net_quality_interval()
        segment = replace(segment, scoring_tokens=self.num_tokens)
        return forecast_replay(net, interval, segment, guide_tokens=tokens)


def estimate_forward_drift(
    samples: Sequence[DriftSamples], parts: Sequence[Candidate], *, formula: SignalFormula
) -> list[Drift | None]:
    """From the current policy's samples on each slice, weighted as its strata are; None without samples."""
    inside = []
    for each, part in zip(samples, parts, strict=True):
        prompt_ids = frozenset(part.prompt_ids)
        inside.append([sample for sample in each.forward if sample.prompt_id in prompt_ids])
    return [
        build_drift(own, behind_V, part.prompt_ids, weights_BP=part.weights_BP, formula=formula)
        for own, behind_V, part in zip(inside, select_variance_samples(inside), parts, strict=True)
    ]


def estimate_backward_drift(
    samples: Sequence[DriftSamples], *, rng: np.random.Generator, formula: SignalFormula
) -> list[Drift | None]:
    """From the old policies' recorded samples, their prompts resampled for all distances at once; None without any."""
    ids = [sorted({sample.prompt_id for sample in each.backward}) for each in samples]
    recorded = sorted({prompt_id for own in ids for prompt_id in own})
    if not recorded:
        return [None for _ in samples]
    counts_BR = bootstrap_counts(len(recorded), rng, formula.settings.bootstrap_resamples)
    column = {prompt_id: r for r, prompt_id in enumerate(recorded)}
    return [
        build_drift(
            each.backward,
            each.backward,
            own,
            weights_BP=counts_BR[:, [column[prompt_id] for prompt_id in own]],
            formula=formula,
        )
        for each, own in zip(samples, ids, strict=True)
    ]


def select_drift(forward: Drift | None, backward: Drift | None, samples: str) -> Drift | None:
    """The drift that enters S: from the samples of the `guide` or of the `learner`, or the other if that is missing."""
    first, second = (forward, backward) if samples == "guide" else (backward, forward)
    return first if first is not None else second


def is_drift_consistent(forward: Drift | None, backward: Drift | None, formula: SignalFormula) -> bool | None:
    """Whether the 95 % intervals of V from all samples overlap; None if one side has fewer than 32 samples.

    The interval of a handful of prompts is narrow by chance, and would contradict any other.
    """
    if forward is None or backward is None or formula.settings.variance not in BIDIRECTIONAL_KINDS:
        return None
    if min(forward.moments_all.samples.sum(), backward.moments_all.samples.sum()) < MIN_SAMPLES:
        return None
    (low, high), (other_low, other_high) = forward.interval(formula), backward.interval(formula)
    return low <= other_high * (1 + ROUNDING) and other_low <= high * (1 + ROUNDING)


def is_heavy_tailed(forward: Sequence[SampleRatio], backward: Sequence[SampleRatio]) -> bool | None:
    """Whether E_b[w^2] and E_a[w], equal by definition, differ by more than two joint standard errors over prompts.

    Then one side has not sampled the weights that dominate the moment. None below 32 samples or two prompts on a side.
    """
    if min(len(forward), len(backward)) < MIN_SAMPLES:
        return None
    logs = _log_means(forward, scale=2.0), _log_means(backward, scale=-1.0)
    if min(map(len, logs)) < 2:
        return None
    # In units of the largest of all, so that nothing overflows.
    largest = max(float(log_P.max()) for log_P in logs)
    guide_P, learner_P = (np.exp(log_P - largest) for log_P in logs)
    error = math.hypot(*(float(mean_P.std(ddof=1)) / math.sqrt(len(mean_P)) for mean_P in (guide_P, learner_P)))
    return abs(float(guide_P.mean() - learner_P.mean())) > STANDARD_ERRORS * error + ROUNDING


def _log_means(samples: Sequence[SampleRatio], *, scale: float) -> Floats:
    """log of the mean of w^scale, one row per prompt."""
    logs: dict[str, list[float]] = {}
    for sample in samples:
        logs.setdefault(sample.prompt_id, []).append(scale * sample.log_w)
    return np.array([float(log_sum_exp(np.array(own), axis=0)) - math.log(len(own)) for own in logs.values()])


# Scores and the verdict


def _score_all(
    candidates: Sequence[RollbackCandidate],
    eligible: Sequence[RollbackCandidate],
    chosen: RollbackCandidate | None,
    formula: SignalFormula,
) -> tuple[RollbackScore, ...]:
    p_best_A = p_best(log_signals([each.candidate for each in eligible], formula)).tolist() if eligible else []
    by_distance = dict(zip([each.distance for each in eligible], p_best_A, strict=True))
    return tuple(
        _score(each, formula, p_best=by_distance.get(each.distance, 0.0), is_selected=each is chosen)
        for each in candidates
    )


def _score(each: RollbackCandidate, formula: SignalFormula, *, p_best: float, is_selected: bool) -> RollbackScore:
    """Q, V, S and the forecast of one distance, V from both sides, and whether they can be trusted."""
    candidate, kind = each.candidate, formula.settings.variance
    drift = candidate.drift
    kl_per_token, kl_per_sequence = (0.0, 0.0) if drift is None else drift.kl(formula)
    net: dict[str, float] = {}
    if candidate.self_values_P is not None:
        quality, net_quality = float(candidate.quality()[0]), float(candidate.net_quality()[0])
        low, high = candidate.net_quality_interval()
        net = {"quality_self": quality - net_quality, "quality_net": net_quality}
        net |= {"quality_net_low": low, "quality_net_high": high}
    return RollbackScore(
        distance=each.distance,
        num_failed_prompts=each.num_failed_prompts,
        num_probed=len(candidate.values_P),
        p_best=p_best,
        is_selected=is_selected,
        variance_kind=kind,
        variances={} if drift is None else drift.variances(formula),
        variance_forward=None if each.forward is None else each.forward.variances(formula)[kind],
        variance_backward=None if each.backward is None else each.backward.variances(formula)[kind],
        variances_agree=is_drift_consistent(each.forward, each.backward, formula),
        has_heavy_tail=is_heavy_tailed(each.samples.forward, each.samples.backward),
        kl_per_token=kl_per_token,
        kl_per_sequence=kl_per_sequence,
        num_backward_samples=len(each.samples.backward),
        **net,
        **({} if each.forecast is None else asdict(each.forecast)),
        **estimate_signal(candidate, formula),
    )


def _rejection_reason(
    build: RollbackEstimator, chosen: RollbackCandidate | None, split: SplitMeasurement | None, formula: SignalFormula
) -> str:
    """Why the rollback is rejected; empty if it is accepted."""
    strata, settings, distances = build.strata, build.settings, [each.distance for each in build.samples]
    reason = _pool_reason(strata, distances, settings)
    if reason:
        return reason
    if chosen is None:
        farthest = max(distances)
        num_failed = count_failed_prompts(strata, farthest)
        return f"none of the {num_failed} failed prompts of the last {farthest} steps was probed"
    if split is None:
        return f"too few of the prompts failed in the last {chosen.distance} steps were probed to split them in two"
    return _quality_reason(chosen, split, formula, settings) or _value_reason(chosen, split, settings)


def _pool_reason(strata: Sequence[Stratum], distances: Sequence[int], settings: AutonpoSettings) -> str:
    if not distances:
        return "no checkpoint to go back to"
    farthest, least = max(distances), settings.rollback.min_failed_prompts
    num_failed = count_failed_prompts(strata, farthest)
    if num_failed >= least:
        return ""
    return (
        f"only {num_failed} failed prompts in the last {farthest} steps; autonpo.rollback.min_failed_prompts is {least}"
    )


def _quality_reason(
    chosen: RollbackCandidate, split: SplitMeasurement, formula: SignalFormula, settings: AutonpoSettings
) -> str:
    """Q of the choice, on samples that did not make it."""
    limit, is_net = least_quality(chosen.candidate, formula, settings), chosen.candidate.is_net(formula)
    if split.low >= limit and not (is_net and split.low <= 0):
        return ""
    quality, low, high = map(_percent, (split.quality, split.low, split.high))
    prompts = f"of the prompts failed in the last {chosen.distance} steps"
    least = "the lower bound must be above 0" if limit <= 0 else f"autonpo.probe.min_quality is {_percent(limit)}"
    if is_net:
        return f"the policy solves {quality} [{low}, {high}] more {prompts} than the policy of that time would; {least}"
    return f"the policy solves {quality} [{low}, {high}] {prompts}; {least}"


def _value_reason(chosen: RollbackCandidate, split: SplitMeasurement, settings: AutonpoSettings) -> str:
    """The forecast of the choice, on samples that did not make it."""
    least = settings.rollback.min_value
    if least <= 0 or (split.value is not None and split.value >= least):
        return ""
    if split.value is None or chosen.forecast is None:
        return "the run has no record of the steps to replay, so the value of a rollback cannot be forecast"
    return (
        f"a rollback by {chosen.distance} steps is expected to save {split.value:.2g} steps per step that it costs "
        f"({chosen.forecast.price:.1f}); autonpo.rollback.min_value is {least:g}"
    )


def _percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"
