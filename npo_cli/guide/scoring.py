"""One candidate's line in the ranking: every figure with its interval, on the candidate's own prompts.

Who is chosen is not known here. Axes: P prompts, B rows of prompt counts (row 0 = the data as they are).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from npo_cli.guide.evidence import CandidateResults, CandidateEvidence, SignalKnobs, mean_quality
from npo_cli.guide.pairing import SignalFormula, resample_signal
from npo_cli.guide.quality import Floats, percentile_interval, pass_rate_interval
from npo_cli.guide.variance import HEAVY_TAILED, VARIANCE_ESTIMATORS, LARGEST_LOG, Moments, estimate_kl_floor, log_variances, net_kl, pool_moments
from npo_cli.guide.weights import MIN_SAMPLES
from npo_cli.records import CheckpointScore


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
        "unreliable": health.num_samples < MIN_SAMPLES or (knobs.variance in HEAVY_TAILED and health.is_dominated),
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
