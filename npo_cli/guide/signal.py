"""Rank candidate guides for one learner: S = Q/V, with intervals and the chance that each is the best.

Knows counts and ratios, no model and no file. What Q, V and S mean is told in SIGNAL.md. Axes: A candidates,
P prompts, B rows of prompt counts (row 0 = the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npo_cli.guide.evidence import CandidateResults, CandidateEvidence, PromptPassCount, SignalKnobs, gather_evidence, list_queried_prompts
from npo_cli.guide.pairing import SELECTION_RULES, Candidate, SignalFormula, p_best, paired_log_signals
from npo_cli.guide.quality import bootstrap_counts
from npo_cli.guide.scoring import RankingContext, score_candidate
from npo_cli.guide.variance import HEAVY_TAILED, VARIANCE_ESTIMATORS, Moments, SampleRatio, VarianceKind, compute_moments
from npo_cli.records import CheckpointScore

__all__ = ["Arm", "Lead", "PromptOutcome", "SampleRatio", "SignalKnobs", "leads", "rank_arms", "variance_range_warning"]

FLAT_RANGE = 1.05


def rank_candidates(self_arm: CandidateResults, arms: Sequence[CandidateResults], knobs: SignalKnobs) -> tuple[CheckpointScore, ...]:
    """Score every candidate, in the order given, and mark the one that `knobs.rule` chooses.

    Prompts are resampled with all their samples, jointly for all candidates. V comes from the verified-correct
    samples if every candidate has 32, else from all samples, so that all are measured alike. A heavy-tailed kind
    (seq2, ess) that a few weights dominate anywhere gives way to seq2_lognormal everywhere.
    """
    # Everyone is judged on prompts that the learner fails.
    prompt_ids = list_queried_prompts(self_arm, arms)
    rng = np.random.default_rng(knobs.seed)
    counts_BP = bootstrap_counts(len(prompt_ids), rng, knobs.resamples)
    # Sum the evidence per prompt, once.
    evidence = gather_evidence(arms, prompt_ids, knobs)
    candidates = [each.candidate for each in evidence]
    self_moments = compute_moments(self_arm.ratios, prompt_ids, cap=knobs.cap)
    ranking = SignalFormula(variance=_trusted_kind(knobs, evidence), knobs=knobs.variance_knobs, alpha=knobs.alpha)
    # Rank on shared prompts.
    log_signal_BA = paired_log_signals(candidates, counts_BP, learner_moments=self_moments, formula=ranking)
    distances = [arm.distance for arm in arms]
    chosen = SELECTION_RULES[knobs.rule](log_signal_BA, distances)
    # What would another profile have chosen from the same samples?
    others = _other_choices(candidates, self_moments=self_moments, distances=distances, ranking=ranking)
    others["one_se"] = SELECTION_RULES["one_se"](log_signal_BA, distances)
    chosen_by = {name: arms[a].step for name, a in others.items()}
    p_best_A = p_best(log_signal_BA)
    setting = RankingContext(learner_results=self_arm, learner_moments=self_moments, formula=ranking, knobs=knobs)
    return tuple(
        replace(
            score_candidate(each, counts_BP, setting),
            p_best=float(p_best_A[a]),
            chosen=a == chosen,
            chosen_by=chosen_by,
        )
        for a, each in enumerate(evidence)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BestCandidate:
    """Who leads under one kind of V."""

    index: int
    """Of the arm with the largest S."""
    p_best_A: tuple[float, ...]
    """Of each arm."""


def find_best_per_variance(self_arm: CandidateResults, arms: Sequence[CandidateResults], knobs: SignalKnobs) -> dict[VarianceKind, BestCandidate]:
    """Under every V, from the same samples and the same resamples: the largest S, and how sure that is."""
    prompt_ids = list_queried_prompts(self_arm, arms)
    counts_BP = bootstrap_counts(len(prompt_ids), np.random.default_rng(knobs.seed), knobs.resamples)
    candidates = [each.candidate for each in gather_evidence(arms, prompt_ids, knobs)]
    self_moments = compute_moments(self_arm.ratios, prompt_ids, cap=knobs.cap)
    found = {}
    for kind in VARIANCE_ESTIMATORS:
        ranking = SignalFormula(variance=kind, knobs=knobs.variance_knobs, alpha=knobs.alpha)
        log_signal_BA = paired_log_signals(candidates, counts_BP, learner_moments=self_moments, formula=ranking)
        place = SELECTION_RULES["argmax"](log_signal_BA, [arm.distance for arm in arms])
        found[kind] = BestCandidate(index=place, p_best_A=tuple(p_best(log_signal_BA).tolist()))
    return found


def variance_range_warning(scores: Sequence[CheckpointScore]) -> str | None:
    """One sentence if V varies by less than 5 % over the candidates, so that S ranks by Q alone; None for one."""
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


def _trusted_kind(knobs: SignalKnobs, evidence: Sequence[CandidateEvidence]) -> VarianceKind:
    """The V asked for, unless it averages weights that a few samples dominate for some candidate."""
    if knobs.variance in HEAVY_TAILED and any(each.diagnostics.is_dominated for each in evidence):
        return "seq2_lognormal"
    return knobs.variance


def _other_choices(
    candidates: Sequence[Candidate], *, self_moments: Moments, distances: Sequence[int], ranking: SignalFormula
) -> dict[str, int]:
    """Place of the argmax of S under each profile: same samples, same alpha, another V."""
    profiles = {
        "faithful": replace(ranking, variance="kl_exp", knobs=replace(ranking.knobs, kappa=1.0)),
        "group2": replace(ranking, variance="group2"),
        "calibrated": replace(ranking, variance="kl_exp"),
        "seq_kl": replace(ranking, variance="seq2_lognormal"),
    }
    data_1P = np.ones((1, len(candidates[0].covered_P)))
    return {
        name: SELECTION_RULES["argmax"](
            paired_log_signals(candidates, data_1P, learner_moments=self_moments, formula=profile), distances
        )
        for name, profile in profiles.items()
    }
