"""Rank guide candidates for one learner, "no guide" among them, with intervals and the probability to be best.

Axes: A candidates, P prompts, B bootstrap resamples (row 0 = the data as they are).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from npo_cli.errors import NpoError
from npo_cli.scoring.forecast import ReplaySegment, expect_guide_tokens, forecast_replay
from npo_cli.scoring.quality import Floats, PromptPassCount, bootstrap_counts, pass_at_k
from npo_cli.scoring.signal import (
    Candidate,
    Selection,
    build_drift,
    estimate_signal,
    paired_log_signals,
    select_candidate,
    split_quality_net,
    trusted_formula,
)
from npo_cli.scoring.variance import HEAVY_TAILED, SampleRatio, SignalFormula, compute_moments
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES, has_enough_correct, select_variance_samples
from npo_cli.types.scores import NO_GUIDE, CandidateScore

FLAT_RANGE = 1.05
OFF_LINE_DISTANCE = 10**9
"""Distance of a candidate that is not on the learner's line: of equals it is chosen last."""
RECORDED_NOTE = "recorded responses, as many per prompt as there are"
NO_LOGPROBS_NOTE = "no V and S: its log-probabilities are not available"
NO_SAMPLES_NOTE = "no V and S: it has no samples of these prompts"
IN_ROUNDS_NOTE = "sampled until solved: pass@1 is too high"
ALL_SAMPLES_NOTE = f"V from all samples: fewer than {MIN_SAMPLES} are correct"


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
    num_tokens: int = 0
    """Of all its samples."""
    segment: ReplaySegment | None = None
    """The replay that it would be used in, for the forecast; None: the run has no record of it."""


def rank_candidates(
    learner: CandidateResults, results: Sequence[CandidateResults], formula: SignalFormula, *, seed: int
) -> tuple[CandidateScore, ...]:
    """Score every candidate, in the order given, then "no guide"; mark the one chosen by `scoring.selection_rule`.

    Prompts are resampled with all their samples, jointly for all candidates. V rests on a candidate's verified-correct
    samples if it has 32, else on all of its samples. A heavy-tailed kind of V (seq2, ess) that a few weights dominate
    for any candidate is replaced by seq2_lognormal for all. Candidates without importance ratios have a Q, and take no
    part in the choice; if none has them, nothing is selected.
    """
    prompt_ids = list_sampled_prompts(learner, results)
    counts_BP = bootstrap_counts(len(prompt_ids), np.random.default_rng(seed), formula.settings.bootstrap_resamples)
    candidates = build_candidates(learner, results, prompt_ids, counts_BP=counts_BP, formula=formula)
    measured = [a for a, candidate in enumerate(candidates) if candidate.drift is not None]
    used = trusted_formula(candidates, formula)
    is_heavy_tailed = formula.settings.variance in HEAVY_TAILED
    no_guide = build_no_guide(learner, prompt_ids, counts_BP=counts_BP, formula=formula)
    scores = [_score_unranked(own, one, used) for own, one in zip(results, candidates, strict=True)]
    shared = [count for count in learner.pass_counts if count.prompt_id in set(prompt_ids)]
    nothing = replace(learner, candidate=NO_GUIDE, source=NO_GUIDE, step=None, pass_counts=shared)
    scores.append(replace(_score_unranked(nothing, no_guide, used), **estimate_signal(no_guide, used), price=0.0))
    if not measured:
        return tuple(scores)
    ranked, guides = [*measured, len(candidates)], [candidates[a] for a in measured]
    selection = select_candidate(
        [*guides, no_guide], used, compare=paired_log_signals, values=[scores[a].value for a in ranked]
    )
    for a in measured:
        scores[a] = replace(scores[a], **_variance_fields(candidates[a], used, is_heavy_tailed=is_heavy_tailed))
    for place, a in enumerate(ranked):
        selected = _selection_fields(selection, place, [scores[each].candidate for each in ranked])
        scores[a] = replace(scores[a], **selected)
    chosen = ranked[selection.index]
    if chosen == len(candidates):
        reason = explain_no_guide([scores[a] for a in measured], formula.settings.selection_rule)
        scores[chosen] = replace(scores[chosen], note=reason)
    else:
        split = split_quality_net(guides, used, compare=paired_log_signals)
        scores[chosen] = replace(scores[chosen], quality_net_split=split)
    return tuple(scores)


def explain_no_guide(scores: Sequence[CandidateScore], rule: str) -> str:
    """Why none of these guides is selected."""
    worthwhile = [one for one in scores if (one.quality_net_low or 0.0) > 0]
    if not worthwhile:
        best = max(scores, key=lambda one: one.quality_net)
        low, high = best.quality_net_low or 0.0, best.quality_net_high or 0.0
        return (
            "no candidate is shown to solve more than the learner's own second try (the best, "
            f"{best.candidate}: {best.quality_net:+.3f} [{low:+.3f}, {high:+.3f}])"
        )
    if rule != "value":
        return "the learner's own second try has the larger S"
    best = max(worthwhile, key=lambda one: one.value or 0.0)
    if best.value is None:
        return "the run has no record of the steps to replay, so their value cannot be forecast"
    return (
        f"no candidate is expected to save as many steps as it costs (the best, {best.candidate}: "
        f"{best.steps_saved:.1f} steps saved for {best.price:.1f})"
    )


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
    assert {count.prompt_id for count in learner.pass_counts} >= set(prompt_ids), (
        "the learner is sampled on all of them"
    )
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
    self_values_P = _values_on(learner, prompt_ids, formula)
    variance_samples = select_variance_samples([own.ratios for own in results])
    candidates = []
    for own, behind_V in zip(results, variance_samples, strict=True):
        sampled = {count.prompt_id for count in own.pass_counts}
        covered_P = np.array([prompt_id in sampled for prompt_id in prompt_ids])
        weights_BP = counts_BP * covered_P
        candidates.append(
            Candidate(
                distance=OFF_LINE_DISTANCE if own.distance is None else abs(own.distance),
                prompt_ids=tuple(prompt_ids),
                weights_BP=weights_BP,
                values_P=_values_on(own, prompt_ids, formula),
                self_values_P=self_values_P * covered_P,
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


def build_no_guide(
    learner: CandidateResults, prompt_ids: Sequence[str], *, counts_BP: Floats, formula: SignalFormula
) -> Candidate:
    """ "No guide": the learner's own second try on all prompts."""
    values_P = _values_on(learner, prompt_ids, formula)
    return Candidate(
        distance=0,
        prompt_ids=tuple(prompt_ids),
        weights_BP=counts_BP,
        values_P=values_P,
        self_values_P=values_P,
        strata_P=np.zeros(len(prompt_ids), dtype=np.intp),
        drift=None,
        is_learner=True,
    )


def _values_on(own: CandidateResults, prompt_ids: Sequence[str], formula: SignalFormula) -> Floats:
    """Quality per prompt; 0 where it was not sampled."""
    by_id = {count.prompt_id: _quality(own, count, quality_k(formula)) for count in own.pass_counts}
    return np.array([by_id.get(prompt_id, 0.0) for prompt_id in prompt_ids])


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


def _score_unranked(own: CandidateResults, candidate: Candidate, formula: SignalFormula) -> CandidateScore:
    """All of a score that needs no importance ratios: Q, Q net of the learner, and the forecast."""
    num_samples = sum(count.num_samples for count in own.pass_counts)
    quality, quality_net = float(candidate.quality()[0]), float(candidate.net_quality()[0])
    quality_low, quality_high = candidate.quality_interval()
    net_interval = candidate.net_quality_interval()
    forecast = {}
    if own.segment is not None:
        tokens_per_sample = own.num_tokens / max(1, num_samples)
        tokens = expect_guide_tokens(own.pass_counts, own.segment, tokens_per_sample=tokens_per_sample)
        tokens = tokens if own.is_fresh else 0.0
        forecast = asdict(forecast_replay(quality_net, net_interval, own.segment, guide_tokens=tokens))
    return CandidateScore(
        candidate=own.candidate,
        source=own.source,
        step=own.step,
        distance=own.distance,
        num_prompts=len(own.pass_counts),
        num_samples=num_samples,
        quality_kind=formula.settings.quality if own.is_fresh else "any",
        quality=quality,
        quality_low=quality_low,
        quality_high=quality_high,
        quality_self=quality - quality_net,
        quality_net=quality_net,
        quality_net_low=net_interval[0],
        quality_net_high=net_interval[1],
        pass_at_1=float(np.mean([count.num_correct / max(1, count.num_samples) for count in own.pass_counts])),
        pass_at_k=mean_quality(own, formula.settings.samples_per_prompt),
        variance_kind=formula.settings.variance,
        is_distance=not formula.is_weighted,
        note="" if candidate.is_learner else "; ".join(_notes(own, num_samples, formula)),
        **forecast,
    )


def _notes(own: CandidateResults, num_samples: int, formula: SignalFormula) -> Iterator[str]:
    if not own.is_fresh:
        yield RECORDED_NOTE
    elif formula.settings.samples_per_round is not None:
        yield IN_ROUNDS_NOTE
    if not own.ratios:
        yield NO_LOGPROBS_NOTE if num_samples else NO_SAMPLES_NOTE
    elif not has_enough_correct(own.ratios):
        yield ALL_SAMPLES_NOTE


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
    variances = [one.variance for one in scores if one.variance is not None and one.candidate != NO_GUIDE]
    if len(variances) < 2:
        return None
    low, high = min(variances), max(variances)
    if high >= FLAT_RANGE * low:
        return None
    return (
        f"V ({scores[0].variance_kind}) only ranges from {low:.4g} to {high:.4g} over {len(variances)} candidates "
        "(less than 5 %), so S ranks them by Q alone and tends to choose the farthest"
    )
