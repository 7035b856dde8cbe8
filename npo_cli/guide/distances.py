"""One rollback distance: its evidence from a probe, and its line in the confirmation (Q, V, S with intervals).

Who is chosen is not known here. Axes: B rows of resampled prompts (row 0 = the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npo_cli.auto_records import RollbackScore
from npo_cli.guide.evidence import PromptPassCount
from npo_cli.guide.hindsight import (
    DriftDirection,
    DriftSamples,
    DriftEstimate,
    estimate_backward_drift,
    estimate_forward_drift,
    is_heavy_tailed,
    select_drift,
    is_drift_consistent,
)
from npo_cli.guide.mistakes import Stratum
from npo_cli.guide.quality import Floats, percentile_interval, smooth_quality
from npo_cli.guide.slices import ProbedPrompts, resample_strata, stratified_quality_interval, stratified_quality
from npo_cli.guide.variance import LARGEST_LOG, Average, VarianceKind, VarianceKnobs


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
        "heavy_tail": is_heavy_tailed(each.drift_samples.forward, each.drift_samples.backward),
        "kl_per_token": kl_per_token,
        "kl_per_sequence": kl_per_sequence,
        "num_backward": len(each.drift_samples.backward),
    }
