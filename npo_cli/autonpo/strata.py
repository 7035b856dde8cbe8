"""What a probe of the mistakes says of Q: per stratum of age, and per slice (all strata up to a distance).

A slice is estimated from its strata, each weighted by the number N_j of its mistakes, however many of them (M_j) were
asked. Axes: P probed prompts (by stratum), B rows of resampled weights (row 0 = the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npo_cli.rollout.mistake_pool import Stratum
from npo_cli.scoring.evidence import PromptPassCount
from npo_cli.scoring.quality import (
    Floats,
    Interval,
    bootstrap_counts,
    effective_trials,
    intraclass_correlation,
    jeffreys,
    percentile_interval,
    wilson,
)
from npo_cli.types.autonpo import StratumQuality


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedPrompts:
    """The probed prompts, and what they weigh in every resample."""

    prompt_ids: tuple[str, ...]
    max_age_P: NDArray[np.intp]
    """The stratum of each, by its farthest age: the slice of D holds those of farthest <= D."""
    values_P: Floats
    """pass@1 of each."""
    weights_BP: Floats
    """Times drawn within its stratum, times N_j/M_j: every row of a stratum sums to N_j."""

    def within(self, distance: int) -> "ProbedPrompts":
        """The slice of one distance."""
        inside_P = self.max_age_P <= distance
        return ProbedPrompts(
            prompt_ids=tuple(prompt_id for prompt_id, inside in zip(self.prompt_ids, inside_P, strict=True) if inside),
            max_age_P=self.max_age_P[inside_P],
            values_P=self.values_P[inside_P],
            weights_BP=self.weights_BP[:, inside_P],
        )


def resample_strata(
    strata: Sequence[Stratum], probed: Sequence[PromptPassCount], *, rng: np.random.Generator, resamples: int
) -> ProbedPrompts:
    """Resample prompts within each stratum, for all slices at once. A stratum of which none was asked has no part."""
    asked_J = [(stratum, found) for stratum in strata if (found := _found(stratum, probed))]
    outcomes = [outcome for _, found in asked_J for outcome in found]
    assert len(outcomes) == len(probed), "probed prompts are mistakes of the strata"
    assert len({outcome.prompt_id for outcome in probed}) == len(probed), "one outcome a prompt"
    blocks = [
        bootstrap_counts(len(found), rng, resamples) * (len(stratum.prompt_ids) / len(found))
        for stratum, found in asked_J
    ]
    farthest_P = [stratum.max_age for stratum, found in asked_J for _ in found]
    return ProbedPrompts(
        prompt_ids=tuple(outcome.prompt_id for outcome in outcomes),
        max_age_P=np.array(farthest_P, dtype=np.intp),
        values_P=np.array([outcome.num_correct / outcome.num_samples for outcome in outcomes]),
        weights_BP=np.hstack([np.zeros((1 + resamples, 0)), *blocks]),
    )


def stratified_quality(part: ProbedPrompts) -> Floats:
    """quality_B = sum_j N_j q_j/sum_j N_j over the strata of a slice, q_j the mean over its prompts."""
    return part.weights_BP @ part.values_P / part.weights_BP.sum(axis=1)


def stratified_quality_interval(part: ProbedPrompts, quality_B: Floats) -> Interval:
    """95 % interval of a slice's Q; Wilson's with M = P where the prompts of every stratum agree.

    Resampling within strata then changes nothing, and a width of nought would be false certainty.
    """
    if any(np.ptp(part.values_P[part.max_age_P == farthest]) > 0 for farthest in np.unique(part.max_age_P)):
        return percentile_interval(quality_B)
    num_prompts = len(part.values_P)
    return wilson(float(quality_B[0]) * num_prompts, num_prompts)


def estimate_stratum_quality(stratum: Stratum, probed: Sequence[PromptPassCount]) -> StratumQuality:
    """q_j with Jeffreys' interval, as many trials as the clustered samples are worth; 0 in [0, 1] if none was asked."""
    found = _found(stratum, probed)
    correct_P = np.array([outcome.num_correct for outcome in found], dtype=np.float64)
    samples_P = np.array([outcome.num_samples for outcome in found], dtype=np.float64)
    quality, trials = 0.0, 0.0
    if found:
        quality = float((correct_P / samples_P).mean())
        icc = intraclass_correlation(correct_P, samples_P)
        trials = effective_trials(len(found), float(samples_P.mean()), icc)
    low, high = jeffreys(quality * trials, trials)
    return StratumQuality(
        min_age=stratum.min_age,
        max_age=stratum.max_age,
        num_failed_prompts=len(stratum.prompt_ids),
        num_probed=len(found),
        num_samples=int(samples_P.sum()),
        num_correct=int(correct_P.sum()),
        quality=quality,
        quality_low=min(low, quality),
        quality_high=max(high, quality),
    )


def _found(stratum: Stratum, probed: Sequence[PromptPassCount]) -> list[PromptPassCount]:
    """Outcomes of the stratum's prompts."""
    inside = frozenset(stratum.prompt_ids)
    return [outcome for outcome in probed if outcome.prompt_id in inside]
