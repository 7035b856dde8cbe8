"""Rank guide candidates for one learner by S = Q/V^alpha, with intervals and each candidate's probability to be best.

Axes: A candidates, P prompts, B bootstrap resamples (row 0 = the data as they are).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npo_cli.errors import NpoError
from npo_cli.scoring.candidates import (
    Candidate,
    build_drift,
    estimate_signal,
    paired_log_signals,
    select_candidate,
    trusted_formula,
)
from npo_cli.scoring.quality import Floats, PromptPassCount, bootstrap_counts, pass_at_k
from npo_cli.scoring.variance import HEAVY_TAILED, SampleRatio, SignalFormula, VarianceKind, compute_moments
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES, select_variance_samples
from npo_cli.types.rollouts import CheckpointScore

FLAT_RANGE = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateResults:
    """What was sampled from one guide candidate, or from the learner itself (distance 0)."""

    step: int
    distance: int
    """Optimizer steps ahead of the learner."""
    pass_counts: Sequence[PromptPassCount]
    """One per prompt that the learner fails; a candidate dropped early has fewer."""
    ratios: Sequence[SampleRatio]
    """Of all its samples, correct and wrong. The learner's own measure the KL floor."""


def rank_candidates(
    learner: CandidateResults, results: Sequence[CandidateResults], formula: SignalFormula, *, seed: int
) -> tuple[CheckpointScore, ...]:
    """Score every candidate, in the order given, and mark the one chosen by `scoring.selection_rule`.

    Prompts are resampled with all their samples, jointly for all candidates. V rests on the verified-correct samples
    if every candidate has 32, else on all samples, so that all are measured alike. A heavy-tailed kind of V (seq2, ess)
    that a few weights dominate for any candidate is replaced by seq2_lognormal for all.
    """
    prompt_ids = list_sampled_prompts(learner, results)
    counts_BP = bootstrap_counts(len(prompt_ids), np.random.default_rng(seed), formula.settings.bootstrap_resamples)
    candidates = build_candidates(learner, results, prompt_ids, counts_BP=counts_BP, formula=formula)
    used = trusted_formula(candidates, formula)
    selection = select_candidate(candidates, used, compare=paired_log_signals)
    return tuple(
        replace(
            _score(learner, own, candidate, used, is_heavy_tailed=formula.settings.variance in HEAVY_TAILED),
            p_best=selection.p_best_A[a],
            is_selected=a == selection.index,
            selection_by_profile={name: results[place].step for name, place in selection.by_profile.items()},
        )
        for a, (own, candidate) in enumerate(zip(results, candidates, strict=True))
    )


def find_best_per_variance(
    learner: CandidateResults, results: Sequence[CandidateResults], formula: SignalFormula, *, seed: int
) -> Mapping[VarianceKind, tuple[int, tuple[float, ...]]]:
    """Under each kind of V the index of the largest S and p(best) of every candidate, from the same resamples."""
    prompt_ids = list_sampled_prompts(learner, results)
    counts_BP = bootstrap_counts(len(prompt_ids), np.random.default_rng(seed), formula.settings.bootstrap_resamples)
    candidates = build_candidates(learner, results, prompt_ids, counts_BP=counts_BP, formula=formula)
    return select_candidate(candidates, formula, compare=paired_log_signals, all_kinds=True).by_variance_kind


def list_sampled_prompts(learner: CandidateResults, results: Sequence[CandidateResults]) -> list[str]:
    """Ids of the prompts that any candidate was sampled on, sorted."""
    if not results:
        raise NpoError(
            f"there is no candidate guide for the learner at step {learner.step}",
            "Train on past this step (or lower train.save_every), so that a later checkpoint exists.",
        )
    for own in (learner, *results):
        assert len({count.prompt_id for count in own.pass_counts}) == len(own.pass_counts), "one count per prompt"
    prompt_ids = sorted({count.prompt_id for own in results for count in own.pass_counts})
    if not prompt_ids:
        raise NpoError(
            f"the learner at step {learner.step} fails none of the screened prompts, so no guide can help",
            "Raise scoring.num_prompts or guide.inject.max_accuracy, or choose an earlier learner with --at.",
        )
    assert all(own.pass_counts for own in results), "every candidate of a ranking was sampled"
    return prompt_ids


def build_candidates(
    learner: CandidateResults,
    results: Sequence[CandidateResults],
    prompt_ids: Sequence[str],
    *,
    counts_BP: Floats,
    formula: SignalFormula,
) -> list[Candidate]:
    """Weight the prompts of each candidate uniformly, and sum its ratios per prompt."""
    learner_moments = compute_moments(learner.ratios, prompt_ids, cap=formula.settings.weight_cap)
    variance_samples = select_variance_samples([own.ratios for own in results])
    candidates = []
    for own, behind_V in zip(results, variance_samples, strict=True):
        by_id = {count.prompt_id: count for count in own.pass_counts}
        weights_BP = counts_BP * np.array([prompt_id in by_id for prompt_id in prompt_ids])
        values_P = np.array(
            [
                _pass_rate(by_id[prompt_id], quality_k(formula)) if prompt_id in by_id else 0.0
                for prompt_id in prompt_ids
            ]
        )
        drift = build_drift(
            own.ratios, behind_V, prompt_ids, weights_BP=weights_BP, formula=formula, learner_moments=learner_moments
        )
        candidates.append(
            Candidate(
                distance=own.distance,
                prompt_ids=tuple(prompt_ids),
                weights_BP=weights_BP,
                values_P=values_P,
                strata_P=np.zeros(len(prompt_ids), dtype=np.intp),
                drift=drift,
            )
        )
    return candidates


def quality_k(formula: SignalFormula) -> int:
    """The k of `scoring.quality`: pass@1 is the share of correct samples."""
    return formula.settings.samples_per_prompt if formula.settings.quality == "pass@k" else 1


def mean_quality(pass_counts: Sequence[PromptPassCount], k: int) -> float:
    """pass@k, averaged over prompts."""
    return float(np.mean([_pass_rate(count, k) for count in pass_counts]))


def _pass_rate(count: PromptPassCount, k: int) -> float:
    return pass_at_k(count.num_samples, count.num_correct, k)


def _score(
    learner: CandidateResults,
    own: CandidateResults,
    candidate: Candidate,
    formula: SignalFormula,
    *,
    is_heavy_tailed: bool,
) -> CheckpointScore:
    """One candidate's score on its own prompts; p_best and the selection are filled in later."""
    signal, drift = estimate_signal(candidate, formula), candidate.drift
    sampled = {count.prompt_id for count in own.pass_counts}
    shared = [count for count in learner.pass_counts if count.prompt_id in sampled]
    assert shared, "the learner is sampled again on the candidates' prompts"
    quality_self = mean_quality(shared, quality_k(formula))
    kl_per_token, kl_per_sequence = (0.0, 0.0) if drift is None else drift.kl(formula)
    variances = {} if drift is None else drift.variances(formula)
    return CheckpointScore(
        step=own.step,
        distance=own.distance,
        num_prompts=len(sampled),
        num_samples=sum(count.num_samples for count in own.pass_counts),
        p_best=0.0,
        is_selected=False,
        quality_kind=formula.settings.quality,
        quality_self=quality_self,
        quality_net=signal["quality"] - quality_self,
        pass_at_1=mean_quality(own.pass_counts, 1),
        pass_at_k=mean_quality(own.pass_counts, formula.settings.samples_per_prompt),
        variance_kind=formula.settings.variance,
        variances={kind: value for kind, value in variances.items() if kind != formula.settings.variance},
        kl_per_token=kl_per_token,
        kl_per_sequence=kl_per_sequence,
        mean_length=0.0 if drift is None else drift.mean_length,
        ess_fraction=0.0 if drift is None else drift.diagnostics.ess_fraction,
        is_unreliable=drift is None
        or drift.diagnostics.num_samples < MIN_SAMPLES
        or (is_heavy_tailed and drift.diagnostics.is_dominated),
        **signal,
    )


def variance_range_warning(scores: Sequence[CheckpointScore]) -> str | None:
    """A warning if V varies by less than 5 % over the candidates, so that S ranks them by Q alone."""
    if len(scores) < 2:
        return None
    variances = [score.variance for score in scores]
    low, high = min(variances), max(variances)
    if high >= FLAT_RANGE * low:
        return None
    return (
        f"V ({scores[0].variance_kind}) only ranges from {low:.4g} to {high:.4g} over {len(scores)} candidates (less "
        "than 5 %), so S = Q/V ranks them by Q alone and tends to choose the farthest"
    )
