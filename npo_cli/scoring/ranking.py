"""Rank guide candidates for one learner by S = Q/V^alpha, with intervals and each candidate's probability to be best.

Axes: A candidates, P prompts, B bootstrap resamples (row 0 = the data as they are).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npo_cli.errors import NpoError
from npo_cli.scoring.candidates import (
    Candidate,
    Selection,
    build_drift,
    estimate_signal,
    paired_log_signals,
    select_candidate,
    trusted_formula,
)
from npo_cli.scoring.quality import Floats, PromptPassCount, bootstrap_counts, pass_at_k
from npo_cli.scoring.variance import HEAVY_TAILED, SampleRatio, SignalFormula, compute_moments
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES, select_variance_samples
from npo_cli.types.scores import CandidateScore

FLAT_RANGE = 1.05
OFF_LINE_DISTANCE = 10**9
"""Distance of a candidate that is not on the learner's line: of equals it is chosen last."""
RECORDED_NOTE = "recorded responses, as many per prompt as there are"
NO_LOGPROBS_NOTE = "no V and S: its log-probabilities are not available"
NO_SAMPLES_NOTE = "no V and S: it has no samples of these prompts"


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateResults:
    """What was sampled from one guide candidate, or from the learner itself (distance 0)."""

    candidate: str
    """Its SPEC."""
    source: str
    """Name of the guide source."""
    step: int | None
    """Step of a checkpoint of the learner's line."""
    distance: int | None
    """Optimizer steps ahead of the learner; None where it is not on the learner's line."""
    pass_counts: Sequence[PromptPassCount]
    """One per prompt that the learner fails; a candidate dropped early has fewer."""
    ratios: Sequence[SampleRatio]
    """Of all its samples, correct and wrong. The learner's own measure the KL floor. Empty where unavailable."""
    is_fresh: bool = True
    """False: recorded responses, as many per prompt as there happen to be. Its Q is the share of prompts with a correct
    one, and a prompt may have none at all."""


def rank_candidates(
    learner: CandidateResults, results: Sequence[CandidateResults], formula: SignalFormula, *, seed: int
) -> tuple[CandidateScore, ...]:
    """Score every candidate, in the order given, and mark the one chosen by `scoring.selection_rule`.

    Prompts are resampled with all their samples, jointly for all candidates. V rests on the verified-correct samples
    if every candidate has 32, else on all samples, so that all are measured alike. A heavy-tailed kind of V (seq2, ess)
    that a few weights dominate for any candidate is replaced by seq2_lognormal for all. Candidates without importance
    ratios have a Q, and take no part in the choice.
    """
    prompt_ids = list_sampled_prompts(learner, results)
    counts_BP = bootstrap_counts(len(prompt_ids), np.random.default_rng(seed), formula.settings.bootstrap_resamples)
    candidates = build_candidates(learner, results, prompt_ids, counts_BP=counts_BP, formula=formula)
    measured = [a for a, candidate in enumerate(candidates) if candidate.drift is not None]
    used = trusted_formula(candidates, formula)
    is_heavy_tailed = formula.settings.variance in HEAVY_TAILED
    fields = [
        _quality_fields(learner, own, candidate, used) for own, candidate in zip(results, candidates, strict=True)
    ]
    if measured:
        selection = select_candidate([candidates[a] for a in measured], used, compare=paired_log_signals)
        for place, a in enumerate(measured):
            fields[a] |= _variance_fields(candidates[a], used, is_heavy_tailed=is_heavy_tailed)
            fields[a] |= _selection_fields(selection, place, [results[each].candidate for each in measured])
    return tuple(CandidateScore(**values) for values in fields)


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
        counts = [by_id.get(prompt_id) for prompt_id in prompt_ids]
        weights_BP = counts_BP * np.array([count is not None for count in counts])
        candidates.append(
            Candidate(
                distance=OFF_LINE_DISTANCE if own.distance is None else abs(own.distance),
                prompt_ids=tuple(prompt_ids),
                weights_BP=weights_BP,
                values_P=np.array([_quality(own, count, quality_k(formula)) if count else 0.0 for count in counts]),
                strata_P=np.zeros(len(prompt_ids), dtype=np.intp),
                drift=build_drift(
                    own.ratios,
                    behind_V,
                    prompt_ids,
                    weights_BP=weights_BP,
                    formula=formula,
                    learner_moments=learner_moments,
                ),
            )
        )
    return candidates


def quality_k(formula: SignalFormula) -> int:
    """The k of `scoring.quality`: pass@1 is the share of correct samples."""
    return formula.settings.samples_per_prompt if formula.settings.quality == "pass@k" else 1


def mean_quality(own: CandidateResults, k: int) -> float:
    """pass@k averaged over prompts; of recorded responses the share of prompts with a correct one."""
    return float(np.mean([_quality(own, count, k) for count in own.pass_counts]))


def _quality(own: CandidateResults, count: PromptPassCount, k: int) -> float:
    if not own.is_fresh:
        return float(count.num_correct > 0)
    return pass_at_k(count.num_samples, count.num_correct, k)


def _quality_fields(
    learner: CandidateResults, own: CandidateResults, candidate: Candidate, formula: SignalFormula
) -> dict[str, Any]:
    """All fields of a score that need no importance ratios."""
    sampled = {count.prompt_id for count in own.pass_counts}
    shared = [count for count in learner.pass_counts if count.prompt_id in sampled]
    assert shared, "the learner is sampled again on the candidates' prompts"
    quality, num_samples = float(candidate.quality()[0]), sum(count.num_samples for count in own.pass_counts)
    quality_low, quality_high = candidate.quality_interval()
    quality_self = mean_quality(replace(learner, pass_counts=shared), quality_k(formula))
    return {
        "candidate": own.candidate,
        "source": own.source,
        "step": own.step,
        "distance": own.distance,
        "num_prompts": len(sampled),
        "num_samples": num_samples,
        "quality_kind": formula.settings.quality if own.is_fresh else "any",
        "quality": quality,
        "quality_low": quality_low,
        "quality_high": quality_high,
        "quality_self": quality_self,
        "quality_net": quality - quality_self,
        "pass_at_1": sum(count.num_correct for count in own.pass_counts) / max(1, num_samples),
        "pass_at_k": mean_quality(own, formula.settings.samples_per_prompt),
        "variance_kind": formula.settings.variance,
        "note": "; ".join(_notes(own, num_samples)),
    }


def _notes(own: CandidateResults, num_samples: int) -> Iterator[str]:
    if not own.is_fresh:
        yield RECORDED_NOTE
    if not own.ratios:
        yield NO_LOGPROBS_NOTE if num_samples else NO_SAMPLES_NOTE


def _variance_fields(candidate: Candidate, formula: SignalFormula, *, is_heavy_tailed: bool) -> dict[str, Any]:
    """V, S and KL, and whether V can be trusted."""
    drift = candidate.drift
    assert drift is not None
    kl_per_token, kl_per_sequence = drift.kl(formula)
    variances = drift.variances(formula)
    return estimate_signal(candidate, formula) | {
        "variances": {kind: value for kind, value in variances.items() if kind != formula.settings.variance},
        "kl_per_token": kl_per_token,
        "kl_per_sequence": kl_per_sequence,
        "mean_length": drift.mean_length,
        "ess_fraction": drift.diagnostics.ess_fraction,
        "is_unreliable": drift.diagnostics.num_samples < MIN_SAMPLES
        or (is_heavy_tailed and drift.diagnostics.is_dominated),
    }


def _selection_fields(selection: Selection, place: int, names: Sequence[str]) -> dict[str, Any]:
    by_kind = selection.by_variance_kind
    return {
        "p_best": selection.p_best_A[place],
        "is_selected": place == selection.index,
        "selection_by_profile": {name: names[index] for name, index in selection.by_profile.items()},
        "p_best_by_variance_kind": {kind: p_best_A[place] for kind, (_, p_best_A) in by_kind.items()},
        "best_for_variance_kinds": tuple(kind for kind, (best, _) in by_kind.items() if best == place),
    }


def variance_range_warning(scores: Sequence[CandidateScore]) -> str | None:
    """A warning if V varies by less than 5 % over the candidates, so that S ranks them by Q alone."""
    variances = [score.variance for score in scores if score.variance is not None]
    if len(variances) < 2:
        return None
    low, high = min(variances), max(variances)
    if high >= FLAT_RANGE * low:
        return None
    return (
        f"V ({scores[0].variance_kind}) only ranges from {low:.4g} to {high:.4g} over {len(variances)} candidates "
        "(less than 5 %), so S = Q/V ranks them by Q alone and tends to choose the farthest"
    )
