"""Rank candidate guides for one learner: S = Q/V, with intervals and the chance that each is the best.

Knows counts and ratios, no model and no file. What Q, V and S mean is told in SIGNAL.md. Axes: A candidates,
P prompts, B rows of prompt counts (row 0 = the data as they are).

One candidate's line in the ranking: every figure with its interval, on the candidate's own prompts.

Who is chosen is not known here. Axes: P prompts, B rows of prompt counts (row 0 = the data as they are).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npo_cli.scoring.evidence import (
    CandidateEvidence,
    CandidateResults,
    SignalKnobs,
    gather_evidence,
    list_queried_prompts,
    mean_quality,
)
from npo_cli.scoring.paired_bootstrap import (
    SELECTION_RULES,
    Candidate,
    SignalFormula,
    p_best,
    paired_log_signals,
    resample_signal,
)
from npo_cli.scoring.quality import Floats, bootstrap_counts, pass_rate_interval, percentile_interval
from npo_cli.scoring.variance import (
    HEAVY_TAILED,
    LARGEST_LOG,
    VARIANCE_ESTIMATORS,
    Moments,
    VarianceKind,
    compute_moments,
    estimate_kl_floor,
    log_variances,
    net_kl,
    pool_moments,
)
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES
from npo_cli.types.rollouts import CheckpointScore


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingContext:
    """What all lines of one ranking share."""

    learner_results: CandidateResults
    learner_moments: Moments
    """Of the learner against itself: the KL floor."""
    formula: SignalFormula
    """With the V really used, which may differ from the one asked for."""
    knobs: SignalKnobs


def score_candidate(each: CandidateEvidence, counts_BP: Floats, setting: RankingContext) -> CheckpointScore:
    """Q, V, S and their 95 % intervals. S uses Q~, so it is not exactly quality/variance."""
    own_BP = counts_BP * each.candidate.covered_P
    return CheckpointScore(
        step=each.results.step,
        distance=each.results.distance,
        num_prompts=each.candidate.num_prompts,
        num_samples=sum(outcome.num_samples for outcome in each.results.pass_counts),
        p_best=0.0,
        is_selected=False,
        quality_kind=setting.knobs.quality,
        pass_at_1=mean_quality(each.results.pass_counts, 1),
        pass_at_k=mean_quality(each.results.pass_counts, setting.knobs.k),
        **_signal(each, own_BP, setting),
        **_drift(each, own_BP[:1], setting),
        variances=_other_variances(each, own_BP[:1], setting),
    )


def _signal(each: CandidateEvidence, own_BP: Floats, setting: RankingContext) -> dict[str, float]:
    """Q, V and S with intervals, from the same resamples."""
    candidate = each.candidate
    parts = resample_signal(candidate, own_BP, learner_moments=setting.learner_moments, formula=setting.formula)
    variance_B, signal_B = np.exp(parts.log_variance_B), _exp(parts.log_signal_B)
    quality_low, quality_high = pass_rate_interval(candidate.values_P[candidate.covered_P > 0], parts.quality_B)
    variance_low, variance_high = percentile_interval(variance_B)
    signal_low, signal_high = percentile_interval(signal_B)
    quality, quality_self = float(parts.quality_B[0]), _quality_self(each.results, setting)
    return {
        "quality": quality,
        "quality_self": quality_self,
        "quality_net": quality - quality_self,
        "quality_low": quality_low,
        "quality_high": quality_high,
        "variance": float(variance_B[0]),
        "variance_low": variance_low,
        "variance_high": variance_high,
        "signal": float(signal_B[0]),
        "signal_low": signal_low,
        "signal_high": signal_high,
    }


def _quality_self(arm: CandidateResults, setting: RankingContext) -> float:
    """Q of the learner on the candidate's prompts: what a second try would have found without any guide."""
    asked = {outcome.prompt_id for outcome in arm.pass_counts}
    shared = [outcome for outcome in setting.learner_results.pass_counts if outcome.prompt_id in asked]
    assert shared, "the learner is sampled afresh on the candidates' prompts"
    return mean_quality(shared, setting.knobs.quality_k)


def _drift(each: CandidateEvidence, data_1P: Floats, setting: RankingContext) -> dict[str, float | str | bool]:
    """KL of all samples (right and wrong, else it is no KL), and whether V can be believed."""
    knobs, health = setting.knobs, each.diagnostics
    floor = estimate_kl_floor(pool_moments(setting.learner_moments, data_1P), knobs.average)
    per_token, per_sequence = net_kl(pool_moments(each.moments_all, data_1P), floor, knobs.average)
    return {
        "kl_per_token": float(np.nan_to_num(per_token[0])),
        "kl_per_sequence": float(np.nan_to_num(per_sequence[0])),
        "mean_length": each.num_tokens / health.num_samples if health.num_samples else 0.0,
        "ess_fraction": health.ess_fraction,
        "variance_kind": setting.formula.variance,
        "is_unreliable": health.num_samples < MIN_SAMPLES or (knobs.variance in HEAVY_TAILED and health.is_dominated),
    }


def _other_variances(each: CandidateEvidence, data_1P: Floats, setting: RankingContext) -> Mapping[str, float]:
    """Every V kind but the one in S; nothing where no sample was seen twice."""
    if not each.candidate.has_samples:
        return {}
    moments = pool_moments(each.candidate.moments, data_1P)
    knobs = setting.formula.knobs
    floor = estimate_kl_floor(pool_moments(setting.learner_moments, data_1P), knobs.average)
    return {
        kind: float(np.exp(log_variances(moments, kind=kind, floor=floor, knobs=knobs)[0]))
        for kind in VARIANCE_ESTIMATORS
        if kind != setting.formula.variance
    }


def _exp(log_values: Floats) -> Floats:
    return np.exp(np.clip(log_values, -LARGEST_LOG, LARGEST_LOG))


FLAT_RANGE = 1.05


def rank_candidates(
    self_arm: CandidateResults, arms: Sequence[CandidateResults], knobs: SignalKnobs
) -> tuple[CheckpointScore, ...]:
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
            is_selected=a == chosen,
            selection_by_profile=chosen_by,
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


def find_best_per_variance(
    self_arm: CandidateResults, arms: Sequence[CandidateResults], knobs: SignalKnobs
) -> dict[VarianceKind, BestCandidate]:
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
