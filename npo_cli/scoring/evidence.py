"""The evidence for a ranking: who was asked what, how it came out, and the sums that Q and V are made of.

Axis: P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npo_cli.errors import NpoError
from npo_cli.scoring.paired_bootstrap import Candidate
from npo_cli.scoring.quality import Floats, pass_at_k
from npo_cli.scoring.variance import Average, Moments, SampleRatio, VarianceKind, VarianceKnobs, compute_moments
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES, WeightDiagnostics, diagnose_weights, select_correct


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPassCount:
    """What one policy's fresh samples of one prompt came to."""

    prompt_id: str
    num_samples: int
    num_correct: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateResults:
    """One candidate guide (or the learner itself, at distance 0) and its evidence."""

    step: int
    distance: int
    """Optimiser steps ahead of the learner."""
    pass_counts: Sequence[PromptPassCount]
    """One a prompt that the learner fails; a candidate dropped early has fewer."""
    ratios: Sequence[SampleRatio]
    """Of all its samples, right and wrong. The learner's own measure the KL floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalKnobs:
    """The `scoring` settings that decide a ranking, with the group size and a seed."""

    quality: Literal["pass@1", "pass@k"]
    k: int
    variance: VarianceKind
    kappa: float
    cap: float
    average: Average
    alpha: float
    rule: Literal["argmax", "one_se"]
    group_size: int
    resamples: int
    seed: int

    @property
    def variance_knobs(self) -> VarianceKnobs:
        return VarianceKnobs(kappa=self.kappa, cap=self.cap, average=self.average, group_size=self.group_size)

    @property
    def quality_k(self) -> int:
        """The k behind `quality`: pass@1 is the share correct."""
        return self.k if self.quality == "pass@k" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateEvidence:
    """One arm, summed."""

    results: CandidateResults
    candidate: Candidate
    diagnostics: WeightDiagnostics
    num_tokens: int
    """Of the samples behind V."""
    moments_all: Moments
    """Of all its samples, right and wrong: what KL is measured on."""


def list_queried_prompts(self_arm: CandidateResults, arms: Sequence[CandidateResults]) -> list[str]:
    """Ids of the prompts put to any candidate, sorted."""
    if not arms:
        raise NpoError(
            f"there is no candidate guide for the learner at step {self_arm.step}",
            "Train on past this step (or lower train.save_every), so that a later checkpoint exists.",
        )
    for arm in (self_arm, *arms):
        assert len({outcome.prompt_id for outcome in arm.pass_counts}) == len(arm.pass_counts), "one outcome a prompt"
    prompt_ids = sorted({outcome.prompt_id for arm in arms for outcome in arm.pass_counts})
    if not prompt_ids:
        raise NpoError(
            f"the learner at step {self_arm.step} fails none of the probed prompts, so a guide has nothing to show it",
            "Raise scoring.num_prompts or guide.inject.max_accuracy, or choose an earlier learner with --at.",
        )
    assert all(arm.pass_counts for arm in arms), "every candidate of a ranking was asked something"
    return prompt_ids


def _values(outcomes: Sequence[PromptPassCount], prompt_ids: Sequence[str], k: int) -> tuple[Floats, Floats]:
    """covered_P and values_P: whether each prompt was asked, and its pass@k (0 where it was not)."""
    by_id = {outcome.prompt_id: outcome for outcome in outcomes}
    asked = [by_id.get(prompt_id) for prompt_id in prompt_ids]
    covered_P = np.array([outcome is not None for outcome in asked], dtype=np.float64)
    values_P = np.array([pass_at_k(o.num_samples, o.num_correct, k) if o else 0.0 for o in asked])
    return covered_P, values_P


def mean_quality(outcomes: Sequence[PromptPassCount], k: int) -> float:
    """pass@k of one arm, averaged over the prompts that it was asked."""
    return float(np.mean([pass_at_k(outcome.num_samples, outcome.num_correct, k) for outcome in outcomes]))


def gather_evidence(
    arms: Sequence[CandidateResults], prompt_ids: Sequence[str], knobs: SignalKnobs
) -> list[CandidateEvidence]:
    """What each arm's samples say, ready to be resampled.

    V rests on the samples that a mixed group would take; where any arm has too few, on all samples of every arm.
    """
    enough = all(len(select_correct(arm.ratios)) >= MIN_SAMPLES for arm in arms)
    evidence = []
    for arm in arms:
        behind_V = select_correct(arm.ratios) if enough else tuple(arm.ratios)
        covered_P, values_P = _values(arm.pass_counts, prompt_ids, knobs.quality_k)
        candidate = Candidate(
            covered_P=covered_P, values_P=values_P, moments=compute_moments(behind_V, prompt_ids, cap=knobs.cap)
        )
        evidence.append(
            CandidateEvidence(
                results=arm,
                candidate=candidate,
                diagnostics=diagnose_weights(behind_V),
                num_tokens=sum(sample.num_tokens for sample in behind_V),
                moments_all=compute_moments(arm.ratios, prompt_ids, cap=knobs.cap),
            )
        )
    return evidence
