"""One rollback distance: its evidence from a probe, and its line in the confirmation (Q, V, S with intervals).

Who is chosen is not known here. Axes: B rows of resampled prompts (row 0 = the data as they are).

How far to go back: score every rollback distance from one probe of the mistakes, choose one, accept or not.

Knows counts and ratios, no model and no file. What it decides is told in AUTONPO.md. Axes: A candidates (distances
that some checkpoint allows), B rows of resampled prompts (row 0 = the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from npo_cli.autonpo.drift import (
    DriftDirection,
    DriftEstimate,
    DriftSamples,
    estimate_backward_drift,
    estimate_forward_drift,
    is_drift_consistent,
    is_heavy_tailed,
    select_drift,
)
from npo_cli.autonpo.strata import (
    ProbedPrompts,
    estimate_stratum_quality,
    resample_strata,
    stratified_quality,
    stratified_quality_interval,
)
from npo_cli.rollout.mistake_pool import Stratum
from npo_cli.scoring.evidence import PromptPassCount
from npo_cli.scoring.paired_bootstrap import SELECTION_RULES, p_best
from npo_cli.scoring.quality import Floats, percentile_interval, smooth_quality
from npo_cli.scoring.variance import HEAVY_TAILED, LARGEST_LOG, Average, VarianceKind, VarianceKnobs
from npo_cli.scoring.weight_diagnostics import diagnose_weights
from npo_cli.types.autonpo import ProbeResult, RollbackScore


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackKnobs:
    """The `scoring` and `autonpo` settings that decide a confirmation, with the group size and a seed."""

    variance: VarianceKind
    kappa: float
    cap: float
    average: Average
    group_size: int
    alpha: float
    rule: Literal["argmax", "one_se"]
    direction: DriftDirection
    resamples: int
    seed: int
    q_min: float
    """Accept where the lower 95 % bound of Q reaches this."""
    pool_min: int
    """Fewest mistakes of a slice."""

    @property
    def variance_knobs(self) -> VarianceKnobs:
        return VarianceKnobs(kappa=self.kappa, cap=self.cap, average=self.average, group_size=self.group_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackCandidate:
    """One distance with its evidence."""

    drift_samples: DriftSamples
    num_failed_prompts: int
    probed_prompts: ProbedPrompts
    """The probed prompts of the slice."""
    forward_drift: DriftEstimate | None
    backward_drift: DriftEstimate | None
    drift: DriftEstimate | None
    """The one of the two that enters S."""
    num_probed: int
    """Prompts of the whole probe."""

    @property
    def distance(self) -> int:
        return self.drift_samples.distance


def build_rollback_candidates(
    strata: Sequence[Stratum],
    probed: Sequence[PromptPassCount],
    hindsights: Sequence[DriftSamples],
    *,
    knobs: RollbackKnobs,
) -> list[RollbackCandidate]:
    """Every distance of which something was asked, nearest first, ready to be resampled."""
    assert {each.distance for each in hindsights} <= {stratum.max_age for stratum in strata}, "slices end at strata"
    assert len({each.distance for each in hindsights}) == len(hindsights), "one hindsight a distance"
    rng = np.random.default_rng(knobs.seed)
    asked = resample_strata(strata, probed, rng=rng, resamples=knobs.resamples)
    pairs = [(each, asked.within(each.distance)) for each in sorted(hindsights, key=lambda each: each.distance)]
    kept = [each for each, part in pairs if part.prompt_ids]
    parts = [part for _, part in pairs if part.prompt_ids]
    forward = estimate_forward_drift(kept, parts, cap=knobs.cap)
    backward = estimate_backward_drift(kept, rng=rng, resamples=knobs.resamples, cap=knobs.cap)
    return [
        RollbackCandidate(
            drift_samples=each,
            num_failed_prompts=count_failed_prompts(strata, each.distance),
            probed_prompts=part,
            forward_drift=ahead,
            backward_drift=behind,
            drift=select_drift(ahead, behind, knobs.direction),
            num_probed=len(probed),
        )
        for each, part, ahead, behind in zip(kept, parts, forward, backward, strict=True)
    ]


def count_failed_prompts(strata: Sequence[Stratum], distance: int) -> int:
    """Distinct mistakes that a rollback of this distance undoes."""
    return sum(len(stratum.prompt_ids) for stratum in strata if stratum.max_age <= distance)


def log_signal(each: RollbackCandidate, *, kind: VarianceKind, knobs: VarianceKnobs, alpha: float) -> Floats:
    """log S = log Q~ - alpha log V, Q~ = (M Q + 1/2)/(M + 1); V = 1 where none was measured.

    M is the number of prompts of the whole probe: with that of the slice the half would favour slices hardly asked.
    """
    log_quality_B = np.log(smooth_quality(stratified_quality(each.probed_prompts), each.num_probed))
    return log_quality_B if each.drift is None else log_quality_B - alpha * each.drift.log_variance(kind, knobs)


def score_rollback_candidate(each: RollbackCandidate, kind: VarianceKind, knobs: RollbackKnobs) -> RollbackScore:
    """Q, V and S with 95 % intervals. S uses Q~, so it is not exactly quality/variance."""
    quality_B = stratified_quality(each.probed_prompts)
    quality_low, quality_high = stratified_quality_interval(each.probed_prompts, quality_B)
    log_signal_B = log_signal(each, kind=kind, knobs=knobs.variance_knobs, alpha=knobs.alpha)
    signal_B = np.exp(np.clip(log_signal_B, -LARGEST_LOG, LARGEST_LOG))
    signal_low, signal_high = percentile_interval(signal_B)
    return RollbackScore(
        distance=each.distance,
        num_failed_prompts=each.num_failed_prompts,
        num_probed=len(each.probed_prompts.prompt_ids),
        quality=float(quality_B[0]),
        quality_low=quality_low,
        quality_high=quality_high,
        signal=float(signal_B[0]),
        signal_low=signal_low,
        signal_high=signal_high,
        p_best=0.0,
        is_selected=False,
        **_drift(each, kind, knobs.variance_knobs),
    )


def _drift(each: RollbackCandidate, kind: VarianceKind, knobs: VarianceKnobs) -> dict[str, object]:
    """V of the view in use with its interval, V both ways, and whether they can be believed."""
    variance_B = np.ones(1) if each.drift is None else np.exp(each.drift.log_variance(kind, knobs))
    variance_low, variance_high = percentile_interval(variance_B)
    kl_per_token, kl_per_sequence = (0.0, 0.0) if each.drift is None else each.drift.kl(knobs)
    return {
        "variance": float(variance_B[0]),
        "variance_low": variance_low,
        "variance_high": variance_high,
        "variance_kind": kind,
        "variances": {} if each.drift is None else each.drift.variances(knobs),
        "variance_forward": None if each.forward_drift is None else each.forward_drift.variances(knobs)[kind],
        "variance_backward": None if each.backward_drift is None else each.backward_drift.variances(knobs).get(kind),
        "variances_agree": is_drift_consistent(each.forward_drift, each.backward_drift, kind=kind, knobs=knobs),
        "has_heavy_tail": is_heavy_tailed(each.drift_samples.forward, each.drift_samples.backward),
        "kl_per_token": kl_per_token,
        "kl_per_sequence": kl_per_sequence,
        "num_backward_samples": len(each.drift_samples.backward),
    }


ProbePassCount = PromptPassCount
"""What the present policy's fresh samples of one mistake came to."""


def choose_rollback(
    strata: Sequence[Stratum],
    probed: Sequence[PromptPassCount],
    hindsights: Sequence[DriftSamples],
    *,
    knobs: RollbackKnobs,
    num_tokens: int,
) -> ProbeResult:
    """Choose D* = argmax Q/V (or the nearest within one SE) and accept it where Q's lower bound reaches q_min.

    Prompts are resampled within strata, jointly for all distances. A distance of which nothing was asked has no score.
    """
    # Sum the evidence per slice.
    candidates = build_rollback_candidates(strata, probed, hindsights, knobs=knobs)
    kind = _trusted_kind(candidates, knobs)
    eligible = [each for each in candidates if each.num_failed_prompts >= knobs.pool_min]
    # Choose among the distances with enough mistakes, and ask the other profiles too.
    chosen_by, chances = _choices(eligible, kind, knobs) if eligible else ({}, {})
    chosen = chosen_by.get(knobs.rule)
    # Is what was chosen good enough?
    scores = tuple(
        replace(
            score_rollback_candidate(each, kind, knobs),
            p_best=chances.get(each.distance, 0.0),
            is_selected=each.distance == chosen,
        )
        for each in candidates
    )
    reason = _objection(strata, hindsights, scores, knobs=knobs)
    return ProbeResult(
        is_accepted=not reason,
        reason=reason,
        distance=chosen,
        strata=tuple(estimate_stratum_quality(stratum, probed) for stratum in strata),
        scores=scores,
        selection_by_profile=chosen_by,
        num_prompts=len(probed),
        num_samples=sum(outcome.num_samples for outcome in probed),
        num_tokens=num_tokens,
    )


def _choices(
    eligible: Sequence[RollbackCandidate], kind: VarianceKind, knobs: RollbackKnobs
) -> tuple[dict[str, int], dict[int, float]]:
    """Distance chosen by every profile and rule, and the chance of each distance to be the best."""
    distances = [each.distance for each in eligible]
    log_signal_BA = _log_signals(eligible, kind=kind, knobs=knobs.variance_knobs, alpha=knobs.alpha)
    by_rule = {name: distances[rule(log_signal_BA, distances)] for name, rule in SELECTION_RULES.items()}
    chances = dict(zip(distances, p_best(log_signal_BA).tolist(), strict=True))
    return _other_choices(eligible, knobs) | by_rule, chances


def _trusted_kind(candidates: Sequence[RollbackCandidate], knobs: RollbackKnobs) -> VarianceKind:
    """The V asked for, unless it averages weights that a few samples dominate for some candidate."""
    views = [each.drift for each in candidates if each.drift is not None]
    if knobs.variance in HEAVY_TAILED and any(diagnose_weights(view.samples).is_dominated for view in views):
        return "seq2_lognormal"
    return knobs.variance


def _log_signals(
    eligible: Sequence[RollbackCandidate], *, kind: VarianceKind, knobs: VarianceKnobs, alpha: float
) -> Floats:
    """log_signal_BA. A candidate without a measured V gets -inf, unless nobody has one."""
    own_BA = np.stack([log_signal(each, kind=kind, knobs=knobs, alpha=alpha) for each in eligible], axis=1)
    measured_A = np.array([each.drift is not None for each in eligible])
    return np.where(measured_A, own_BA, -np.inf) if measured_A.any() else own_BA


def _other_choices(eligible: Sequence[RollbackCandidate], knobs: RollbackKnobs) -> dict[str, int]:
    """Distance of the argmax of S under each profile: same samples, same alpha, another V."""
    own = knobs.variance_knobs
    profiles: dict[str, tuple[VarianceKind, VarianceKnobs]] = {
        "faithful": ("kl_exp", replace(own, kappa=1.0)),
        "group2": ("group2", own),
        "calibrated": ("kl_exp", own),
        "seq_kl": ("seq2_lognormal", own),
    }
    distances = [each.distance for each in eligible]
    choices = {}
    for name, (kind, variance_knobs) in profiles.items():
        log_signal_BA = _log_signals(eligible, kind=kind, knobs=variance_knobs, alpha=knobs.alpha)
        choices[name] = distances[SELECTION_RULES["argmax"](log_signal_BA, distances)]
    return choices


def _objection(
    strata: Sequence[Stratum],
    hindsights: Sequence[DriftSamples],
    scores: Sequence[RollbackScore],
    *,
    knobs: RollbackKnobs,
) -> str:
    """Why not to go back, in words; empty where nothing speaks against it."""
    if not hindsights:
        return "no checkpoint to go back to"
    farthest = max(each.distance for each in hindsights)
    num_mistakes = count_failed_prompts(strata, farthest)
    if num_mistakes < knobs.pool_min:
        return (
            f"only {num_mistakes} mistakes in the last {farthest} steps; "
            f"autonpo.rollback.min_failed_prompts is {knobs.pool_min}"
        )
    chosen = next((score for score in scores if score.is_selected), None)
    if chosen is None:
        return f"none of the {num_mistakes} mistakes in the last {farthest} steps was asked again"
    if chosen.quality_low < knobs.q_min:
        quality, low, high = map(_percent, (chosen.quality, chosen.quality_low, chosen.quality_high))
        return (
            f"the policy solves {quality} [{low}, {high}] of the mistakes in the last {chosen.distance} steps; "
            f"autonpo.probe.min_quality is {_percent(knobs.q_min)}"
        )
    return ""


def _percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"
