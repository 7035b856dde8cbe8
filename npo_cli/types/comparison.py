"""Records of `npo compare`: methods, their differences, their costs to reach a threshold. Imports nothing.

A *method* is trained once or with several seeds. Values come for five *axes*: logical step (position in the data
order),
optimizer updates executed, tokens generated, forward passes of sampling, seconds; all but the first with everything
that the method needed besides its own steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Axis = Literal["step", "updates", "tokens", "forwards", "seconds"]
AXES: tuple[Axis, ...] = ("step", "updates", "tokens", "forwards", "seconds")
CurveKind = Literal["own", "best held"]
"""The method's own policy, or the best of all policies that it had paid for, its scout's included."""
ResamplingUnit = Literal["seeds and prompts", "prompts", "seeds", "nothing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedPoint:
    """One held-out evaluation of one seed of a method, with everything it had cost by then."""

    method: str
    seed: int
    run: str
    branch: str
    step: int
    updates: int
    tokens: int
    forwards: int
    """Forward passes of sampling: one a token, and one more where an older copy reads it too."""
    teacher_tokens: int = 0
    """Response tokens that the teacher of a dense target read."""
    seconds: float | None
    """None where the wall clock of some step was not kept."""
    accuracy: float
    entropy: float | None
    curve: CurveKind = "own"
    """Of the best-held curve there is a point for each improvement, with the mean of 3 evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; None in both ends where nothing could be resampled."""

    value: float
    low: float | None = None
    high: float | None = None
    num_used: int = 1
    """Seeds, or pairs of seeds, that it rests on."""
    num_total: int = 1
    """Those that there are: a figure with fewer rests on a part of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveBandPoint:
    """Mean held-out accuracy of a method at one cost, for a picture."""

    method: str
    axis: Axis
    cost: float
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSummary:
    """One method over the range that all methods have in common."""

    method: str
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    """`RUN:BRANCH` of each seed."""
    num_prompts: int | None
    """Held-out prompts of a seed; None where the outcomes of some evaluation were not kept."""
    resampling_unit: ResamplingUnit
    """What the intervals were taken over."""
    horizon: int
    """Logical step of the last evaluations compared: the last that every seed of every method has."""
    final_accuracy: Estimate
    """Held-out accuracy: mean of the last three evaluations up to the horizon."""
    areas: Mapping[str, Estimate]
    """Mean accuracy along each axis, over the range common to all methods; an axis without one is absent."""
    entropies: tuple[float | None, ...]
    """Mean training entropy (nats a token) in each quarter of the horizon."""
    injections_per_step: float
    """Guide slots injected a step, mean over all steps up to the horizon."""
    guide_gradient_share: float | None
    """Share of the gradient norm that came from injected slots, mean over the steps that had one."""
    mean_costs: Mapping[str, float]
    """Mean cost by each axis of standing at the horizon."""
    run_tokens: float
    """Mean over the seeds of every token that the run generated, for this branch or any other."""
    teacher_tokens: float = 0.0
    """Mean over the seeds of the response tokens that a dense target's teacher had read at the horizon."""
    changed_settings: tuple[str, ...]
    """Settings in which the method differs from the baseline: `train.lr 0.0001 -> 0.0003`."""
    mismatched_settings: tuple[str, ...]
    """Settings that a fair comparison needs alike and that are not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodDifference:
    """A method minus the baseline, paired by seed, and by prompt where both have the same prompts."""

    method: str
    baseline: str
    num_pairs: int
    """Seeds that both have; 0: not paired at all."""
    num_prompts: int | None
    """Held-out prompts common to a pair, the fewest of any pair; None: not paired by prompt."""
    resampling_unit: ResamplingUnit
    final_accuracy: Estimate
    areas: Mapping[str, Estimate]
    num_not_lower: int
    """Pairs in which the method's final accuracy is not below the baseline's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodTimeToThreshold:
    """What a method had spent when its held-out accuracy (mean of 3 evaluations) first reached a threshold."""

    method: str
    threshold: float
    curve: CurveKind = "own"
    num_runs: int
    num_reached: int
    costs: Mapping[str, float]
    """Mean over all seeds by axis. One that never arrived counts what it had spent at its end: see `censored`."""
    restricted_means: Mapping[str, float]
    """Restricted mean by axis: mean of min(cost, horizon)."""
    horizons: Mapping[str, float]
    """The smallest cost at which any seed of any method ended."""

    @property
    def is_censored(self) -> bool:
        """Some seed never arrived: then `costs` are lower bounds."""
        return self.num_reached < self.num_runs


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedUp:
    """Cost of the baseline over the cost of the method, to one threshold: above 1 the method is cheaper."""

    method: str
    baseline: str
    threshold: float
    curve: CurveKind = "own"
    ratio_if_reached: Mapping[str, Estimate]
    """By axis: geometric mean of the ratios of pairs of seeds in which both arrived, Student's interval of the log."""
    restricted_mean_ratio: Mapping[str, Estimate]
    """By axis: ratio of the restricted means of the common seeds, arrived or not, Student's interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodHysteresis:
    """Steps from an accuracy to a target, unguided run minus replayed branch, mean over seeds."""

    method: str
    baseline: str
    """The unguided run."""
    accuracy: float
    target: float
    steps: Estimate
    """Interval: Student's, over seeds; none where the mean is a bound."""
    bound: Literal["exact", "at least", "at most"]
    """`at least`: the unguided run of some seed never reached the target; `at most`: its replay never did."""
