"""How far to go back: score every rollback distance from one probe of the mistakes, choose one, accept or not.

Knows counts and ratios, no model and no file. What it decides is told in AUTONPO.md. Axes: A candidates (distances
that some checkpoint allows), B rows of resampled prompts (row 0 = the data as they are).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from npo_cli.auto_records import ProbeResult, RollbackScore
from npo_cli.guide.distances import RollbackCandidate, RollbackKnobs, build_rollback_candidates, log_signal, score_rollback_candidate, count_failed_prompts
from npo_cli.guide.evidence import PromptPassCount
from npo_cli.guide.hindsight import DriftSamples
from npo_cli.guide.mistakes import Stratum
from npo_cli.guide.pairing import SELECTION_RULES, p_best
from npo_cli.guide.quality import Floats
from npo_cli.guide.slices import estimate_stratum_quality
from npo_cli.guide.variance import HEAVY_TAILED, SampleRatio, VarianceKind, VarianceKnobs
from npo_cli.guide.weights import diagnose_weights

__all__ = ["Hindsight", "Probed", "RollbackKnobs", "SampleRatio", "confirm"]

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
        replace(score_rollback_candidate(each, kind, knobs), p_best=chances.get(each.distance, 0.0), chosen=each.distance == chosen)
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


def _log_signals(eligible: Sequence[RollbackCandidate], *, kind: VarianceKind, knobs: VarianceKnobs, alpha: float) -> Floats:
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
