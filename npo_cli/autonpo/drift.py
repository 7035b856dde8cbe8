"""What it would cost a checkpoint of the past to learn from the present policy (V), seen from either side.

Forward: the present policy's samples b, seen by the old checkpoint a, log w = log a - log b. Backward: what the old
policy itself had sampled, seen by the present one, log w = log b - log a, so that the same code gives exp(KL(a||b));
its squares would be those of b/a, another quantity, and are not used.
Axes: P prompts, B rows of weights (row 0 = the data as they are), N samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npo_cli.autonpo.strata import ProbedPrompts
from npo_cli.scoring.quality import Floats, Interval, bootstrap_counts, percentile_interval
from npo_cli.scoring.variance import (
    NO_KL_FLOOR,
    VARIANCE_ESTIMATORS,
    Moments,
    SampleRatio,
    VarianceKind,
    VarianceKnobs,
    compute_moments,
    log_sum_exp,
    log_variances,
    net_kl,
    pool_moments,
)
from npo_cli.scoring.weight_diagnostics import MIN_SAMPLES, select_correct

DriftDirection = Literal["guide", "learner"]

BIDIRECTIONAL_KINDS: tuple[VarianceKind, ...] = ("kl_exp", "seq2_lognormal", "group2")
"""Kinds made of a KL, which the samples of either policy tell up to its direction. A mean square of w = a/b under b
is not that of b/a under a, so the other kinds have no backward view."""
STANDARD_ERRORS = 2.0
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftSamples:
    """One checkpoint that the run could go back to, and the samples that tell how far away it is."""

    distance: int
    """Steps back."""
    forward: Sequence[SampleRatio]
    """The present policy's samples of probed prompts of the slice; log_w = log a - log b."""
    backward: Sequence[SampleRatio]
    """The old policy's samples on record, of mistakes probed or not; log_w = log b - log a."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftEstimate:
    """The samples of one direction, summed per prompt."""

    samples: tuple[SampleRatio, ...]
    """Those behind V."""
    moments: Moments
    """Of the samples behind V."""
    moments_all: Moments
    """Of all samples, right and wrong: what a KL is measured on."""
    weights_BP: Floats

    def log_variance(self, kind: VarianceKind, knobs: VarianceKnobs) -> Floats:
        """log V of every resample; one without a sample behind V repeats row 0."""
        return _log_variance(self.moments, self.weights_BP, kind=kind, knobs=knobs)

    def variances(self, knobs: VarianceKnobs) -> dict[str, float]:
        """Every kind of V, of the data as they are."""
        data_1P = self.weights_BP[:1]
        return {
            kind: float(np.exp(_log_variance(self.moments, data_1P, kind=kind, knobs=knobs)[0]))
            for kind in VARIANCE_ESTIMATORS
        }

    def interval(self, kind: VarianceKind, knobs: VarianceKnobs) -> Interval:
        """95 % interval of V from all samples, by which the two directions can be compared."""
        return percentile_interval(np.exp(_log_variance(self.moments_all, self.weights_BP, kind=kind, knobs=knobs)))

    def kl(self, knobs: VarianceKnobs) -> tuple[float, float]:
        """KL per token and per sequence in nats, from all samples; never below 0."""
        per_token, per_sequence = net_kl(
            pool_moments(self.moments_all, self.weights_BP[:1]), NO_KL_FLOOR, knobs.average
        )
        return float(per_token[0]), float(per_sequence[0])


def estimate_forward_drift(
    hindsights: Sequence[DriftSamples], parts: Sequence[ProbedPrompts], *, cap: float
) -> tuple[DriftEstimate | None, ...]:
    """The present policy's samples on each slice, weighted as its strata are; None where there is none.

    V rests on correct samples if every candidate that has samples has 32 such, else on all samples of all of them.
    """
    seen = [_of_prompts(each.forward, part.prompt_ids) for each, part in zip(hindsights, parts, strict=True)]
    enough = all(len(select_correct(samples)) >= MIN_SAMPLES for samples in seen if samples)
    return tuple(
        _view(
            samples,
            select_correct(samples) if enough else samples,
            part.prompt_ids,
            weights_BP=part.weights_BP,
            cap=cap,
        )
        for samples, part in zip(seen, parts, strict=True)
    )


def estimate_backward_drift(
    hindsights: Sequence[DriftSamples], *, rng: np.random.Generator, resamples: int, cap: float
) -> tuple[DriftEstimate | None, ...]:
    """The old policies' samples on record, their prompts resampled for all distances at once; None without any."""
    ids = [sorted({sample.prompt_id for sample in each.backward}) for each in hindsights]
    recorded = sorted({prompt_id for own in ids for prompt_id in own})
    if not recorded:
        return tuple(None for _ in hindsights)
    counts_BR = bootstrap_counts(len(recorded), rng, resamples)
    place = {prompt_id: r for r, prompt_id in enumerate(recorded)}
    views = []
    for each, own in zip(hindsights, ids, strict=True):
        samples = tuple(each.backward)
        weights_BP = counts_BR[:, [place[prompt_id] for prompt_id in own]]
        views.append(_view(samples, samples, own, weights_BP=weights_BP, cap=cap))
    return tuple(views)


def select_drift(
    forward: DriftEstimate | None, backward: DriftEstimate | None, direction: DriftDirection
) -> DriftEstimate | None:
    """The view that enters S: the one asked for, else the other one."""
    first, second = (forward, backward) if direction == "guide" else (backward, forward)
    return first if first is not None else second


def is_drift_consistent(
    forward: DriftEstimate | None, backward: DriftEstimate | None, *, kind: VarianceKind, knobs: VarianceKnobs
) -> bool | None:
    """Whether the 95 % intervals of V overlap, all samples on either side; None where one side has less than 32.

    A handful of prompts has an interval that is narrow by chance, and would disagree with anything.
    """
    if forward is None or backward is None or kind not in BIDIRECTIONAL_KINDS:
        return None
    if min(forward.moments_all.samples.sum(), backward.moments_all.samples.sum()) < MIN_SAMPLES:
        return None
    (low, high), (other_low, other_high) = forward.interval(kind, knobs), backward.interval(kind, knobs)
    return low <= other_high * (1 + ROUNDING) and other_low <= high * (1 + ROUNDING)


def is_heavy_tailed(forward: Sequence[SampleRatio], backward: Sequence[SampleRatio]) -> bool | None:
    """Whether E_b[w^2] and E_a[w], equal by definition, differ by more than two joint standard errors over prompts.

    Then one side has not met the weights that decide the moment. None below 32 samples or two prompts on a side.
    """
    if min(len(forward), len(backward)) < MIN_SAMPLES:
        return None
    logs = _log_means(forward, scale=2.0), _log_means(backward, scale=-1.0)
    if min(map(len, logs)) < 2:
        return None
    # In units of the largest of all, so that nothing overflows.
    largest = max(float(log_P.max()) for log_P in logs)
    guide_P, learner_P = (np.exp(log_P - largest) for log_P in logs)
    error = math.hypot(*(float(mean_P.std(ddof=1)) / math.sqrt(len(mean_P)) for mean_P in (guide_P, learner_P)))
    return abs(float(guide_P.mean() - learner_P.mean())) > STANDARD_ERRORS * error + ROUNDING


def _log_means(samples: Sequence[SampleRatio], *, scale: float) -> Floats:
    """log of the mean of w^scale, a row a prompt."""
    logs: dict[str, list[float]] = {}
    for sample in samples:
        logs.setdefault(sample.prompt_id, []).append(scale * sample.log_w)
    return np.array([float(log_sum_exp(np.array(own), axis=0)) - math.log(len(own)) for own in logs.values()])


def _of_prompts(samples: Sequence[SampleRatio], prompt_ids: Sequence[str]) -> tuple[SampleRatio, ...]:
    inside = frozenset(prompt_ids)
    return tuple(sample for sample in samples if sample.prompt_id in inside)


def _view(
    samples: tuple[SampleRatio, ...],
    behind_V: tuple[SampleRatio, ...],
    prompt_ids: Sequence[str],
    *,
    weights_BP: Floats,
    cap: float,
) -> DriftEstimate | None:
    if not samples:
        return None
    return DriftEstimate(
        samples=behind_V,
        moments=compute_moments(behind_V, prompt_ids, cap=cap),
        moments_all=compute_moments(samples, prompt_ids, cap=cap),
        weights_BP=weights_BP,
    )


def _log_variance(moments: Moments, weights_BP: Floats, *, kind: VarianceKind, knobs: VarianceKnobs) -> Floats:
    log_V_B = log_variances(pool_moments(moments, weights_BP), kind=kind, floor=NO_KL_FLOOR, knobs=knobs)
    return np.where(np.isnan(log_V_B), log_V_B[0], log_V_B)
