"""How far to roll back: Q, V and S of every rollback distance from one probe of failed prompts; choose and accept.

The estimator is that of guide candidates (scoring/candidates.py). Here the candidates are nested slices, all prompts
that failed within the last D steps; a slice consists of strata of age, and a prompt of a stratum of N_j failed prompts,
M_j of them probed, has the weight N_j/M_j. V is estimated from both sides, which the mathematics allows for kinds
made of a KL only (BIDIRECTIONAL_KINDS):
  forward: samples of the current policy b, scored by the old checkpoint a, log w = log a - log b;
  backward: recorded rollouts of the old policy, scored by the current one, log w = log b - log a, so that the same
  code gives exp(KL(a||b)). Its squares would be those of b/a, another quantity, and are not used.
Axes: A candidates (distances that have a checkpoint), P probed prompts (by stratum), N samples, B bootstrap resamples
(row 0 = the data as they are).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from npo_cli.config.autonpo import AutonpoSettings
from npo_cli.scoring.candidates import (
    Candidate,
    Drift,
    Selection,
    build_drift,
    estimate_signal,
    log_signals,
    select_candidate,
    trusted_formula,
)
from npo_cli.scoring.quality import (
    Floats,
    PromptPassCount,
    bootstrap_counts,
    effective_trials,
    intraclass_correlation,
    jeffreys,
)
from npo_cli.scoring.variance import SampleRatio, SignalFormula, VarianceKind, log_sum_exp
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES, select_variance_samples
from npo_cli.seeds import derive_seed
from npo_cli.types.autonpo import FailedPrompt, ProbeResult, RollbackScore, StratumQuality

BIDIRECTIONAL_KINDS: tuple[VarianceKind, ...] = ("kl_exp", "seq2_lognormal", "group2")
"""Kinds of V made of a KL, which samples of either policy estimate. A mean square of w = a/b under b is not that of
b/a under a, so the other kinds have no backward estimate."""
MIN_PROMPTS_PER_STRATUM = 4
"""Minimum number of prompts probed per stratum."""
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
    """One distance: the candidate of the shared estimator, and the drift estimated from either side."""

    samples: DriftSamples
    candidate: Candidate
    """Its drift is the one that enters S."""
    forward: Drift | None
    backward: Drift | None
    num_failed_prompts: int
    """Failed prompts of the slice, probed or not."""

    @property
    def distance(self) -> int:
        return self.samples.distance


def choose_rollback(
    strata: Sequence[Stratum],
    probed: Sequence[PromptPassCount],
    samples: Sequence[DriftSamples],
    *,
    formula: SignalFormula,
    settings: AutonpoSettings,
    seed: int,
    num_tokens: int,
) -> ProbeResult:
    """Choose D* = argmax S (or the nearest within one SE); accept it if the lower bound of its Q >= probe.min_quality.

    Prompts are resampled within strata, jointly for all distances. A distance without a probed prompt has no score.
    """
    candidates = build_rollback_candidates(strata, probed, samples, formula=formula, settings=settings, seed=seed)
    used = trusted_formula([each.candidate for each in candidates], formula)
    # Only distances with enough failed prompts can be chosen.
    eligible = [each for each in candidates if each.num_failed_prompts >= settings.rollback.min_failed_prompts]
    selection = None
    if eligible:
        selection = select_candidate([each.candidate for each in eligible], used, compare=log_signals)
    scores = _score_all(candidates, eligible, selection, used)
    reason = _rejection_reason(strata, samples, scores, settings=settings)
    by_profile = {} if selection is None else selection.by_profile
    return ProbeResult(
        is_accepted=not reason,
        reason=reason,
        distance=None if selection is None else eligible[selection.index].distance,
        strata=tuple(estimate_stratum_quality(stratum, probed) for stratum in strata),
        scores=scores,
        selection_by_profile={name: eligible[place].distance for name, place in by_profile.items()},
        num_prompts=len(probed),
        num_samples=sum(count.num_samples for count in probed),
        num_tokens=num_tokens,
    )


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


def build_rollback_candidates(
    strata: Sequence[Stratum],
    probed: Sequence[PromptPassCount],
    samples: Sequence[DriftSamples],
    *,
    formula: SignalFormula,
    settings: AutonpoSettings,
    seed: int,
) -> list[RollbackCandidate]:
    """Every distance with a probed prompt, nearest first, ready to be resampled."""
    assert {each.distance for each in samples} <= {stratum.max_age for stratum in strata}, "slices end at strata"
    assert len({each.distance for each in samples}) == len(samples), "one set of samples per distance"
    rng = np.random.default_rng(seed)
    everything = resample_strata(strata, probed, rng=rng, resamples=formula.settings.bootstrap_resamples)
    pairs = [(each, slice_within(everything, each.distance)) for each in sorted(samples, key=lambda own: own.distance)]
    pairs = [(each, part) for each, part in pairs if len(part.values_P)]
    own_samples, parts = [each for each, _ in pairs], [part for _, part in pairs]
    forward = estimate_forward_drift(own_samples, parts, formula=formula)
    backward = estimate_backward_drift(own_samples, rng=rng, formula=formula)
    return [
        RollbackCandidate(
            samples=each,
            candidate=replace(part, drift=select_drift(ahead, behind, settings.probe.variance_samples)),
            forward=ahead,
            backward=behind,
            num_failed_prompts=count_failed_prompts(strata, each.distance),
        )
        for each, part, ahead, behind in zip(own_samples, parts, forward, backward, strict=True)
    ]


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
    selection: Selection | None,
    formula: SignalFormula,
) -> tuple[RollbackScore, ...]:
    p_best = (
        {} if selection is None else dict(zip([each.distance for each in eligible], selection.p_best_A, strict=True))
    )
    selected = None if selection is None else eligible[selection.index].distance
    return tuple(
        _score(each, formula, p_best=p_best.get(each.distance, 0.0), is_selected=each.distance == selected)
        for each in candidates
    )


def _score(each: RollbackCandidate, formula: SignalFormula, *, p_best: float, is_selected: bool) -> RollbackScore:
    """Q, V and S of one distance, V from both sides, and whether they can be trusted."""
    drift, kind = each.candidate.drift, formula.settings.variance
    kl_per_token, kl_per_sequence = (0.0, 0.0) if drift is None else drift.kl(formula)
    return RollbackScore(
        distance=each.distance,
        num_failed_prompts=each.num_failed_prompts,
        num_probed=len(each.candidate.values_P),
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
        **estimate_signal(each.candidate, formula),
    )


def _rejection_reason(
    strata: Sequence[Stratum],
    samples: Sequence[DriftSamples],
    scores: Sequence[RollbackScore],
    *,
    settings: AutonpoSettings,
) -> str:
    """Why the rollback is rejected; empty if it is accepted."""
    if not samples:
        return "no checkpoint to go back to"
    farthest = max(each.distance for each in samples)
    num_failed = count_failed_prompts(strata, farthest)
    if num_failed < settings.rollback.min_failed_prompts:
        return (
            f"only {num_failed} failed prompts in the last {farthest} steps; "
            f"autonpo.rollback.min_failed_prompts is {settings.rollback.min_failed_prompts}"
        )
    chosen = next((score for score in scores if score.is_selected), None)
    if chosen is None:
        return f"none of the {num_failed} failed prompts of the last {farthest} steps was probed"
    if chosen.quality_low < settings.probe.min_quality:
        quality, low, high = map(_percent, (chosen.quality, chosen.quality_low, chosen.quality_high))
        return (
            f"the policy solves {quality} [{low}, {high}] of the prompts failed in the last {chosen.distance} steps; "
            f"autonpo.probe.min_quality is {_percent(settings.probe.min_quality)}"
        )
    return ""


def _percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"
