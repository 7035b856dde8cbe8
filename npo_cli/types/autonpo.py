"""The nouns of AutoNPO: mistakes, what a confirmation found, and the transitions of its state machine.

What they mean together is told in `docs/explanation/autonpo.md`. Imports nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["TRAIN", "PUSH", "AHEAD", "PROBE", "GUIDE_GEN", "ROLLBACK", "REPLAY", "JUDGE", "COOLDOWN"]
Event = Literal[
    "started",
    "armed",
    "warning",
    "recovered",
    "trigger",
    "capped",
    "pushed",
    "unpushed",
    "moved",
    "unmoved",
    "early",
    "missed",
    "accepted",
    "rejected",
    "guided",
    "unguided",
    "rolled_back",
    "replayed",
    "kept",
    "reverted",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedPrompt:
    """A prompt that the policy mostly failed, and when."""

    prompt_id: str
    step: int
    """Training step whose rollouts failed; the policy was that of `step - 1`."""
    accuracy: float
    """Share of the group's own rollouts that were correct."""
    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StratumQuality:
    """Mistakes of one age, and how many of them the policy solves by now."""

    min_age: int
    """Least age in steps; the failures of the newest step have age 0."""
    max_age: int
    """First age that is too old for it: a rollback of this distance undoes all of these failures."""
    num_failed_prompts: int
    """Distinct prompts whose newest failure has this age."""
    num_probed: int
    num_samples: int
    num_correct: int
    quality: float
    """pass@1 of fresh samples."""
    quality_low: float
    quality_high: float
    """95 % Jeffreys interval, as many trials as the samples are worth (clusters of one prompt)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackScore:
    """Q, V and S of one rollback distance (paper section on AutoNPO; algorithms, sections 9 to 11)."""

    distance: int
    num_failed_prompts: int
    """Distinct prompts of the slice: failed in the last `distance` steps."""
    num_probed: int
    quality: float
    """Pass rate on the slice, strata weighted by their size."""
    quality_low: float
    quality_high: float
    variance: float
    """The V that enters S."""
    variance_low: float
    variance_high: float
    variance_kind: str
    variances: Mapping[str, float]
    """Every kind, from the samples behind `variance`."""
    variance_forward: float | None
    """From the present policy's samples, seen by the old checkpoint; None where there is none."""
    variance_backward: float | None
    """Checkpoint-free: from the old policy's samples on record, seen by the present one (section 10.7)."""
    variances_agree: bool | None
    """Whether the two intervals overlap; None where one is missing or rests on less than 32 samples."""
    has_heavy_tail: bool | None
    """E_b[w^2] and E_a[w] differ by more than two standard errors (section 10.5)."""
    kl_per_token: float
    kl_per_sequence: float
    num_backward_samples: int
    """Samples on record behind `variance_backward`."""
    signal: float
    signal_low: float
    signal_high: float
    p_best: float
    """Share of paired resamples in which this distance has the largest S."""
    is_selected: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What a probe of the mistakes found."""

    is_accepted: bool
    reason: str
    """Why it was rejected, in words; empty where it was accepted."""
    distance: int | None
    """D*; None where no distance could be chosen."""
    strata: tuple[StratumQuality, ...]
    scores: tuple[RollbackScore, ...]
    selection_by_profile: Mapping[str, int] = field(default_factory=dict)
    """The distance that each profile would have chosen: faithful, group2, calibrated, seq_kl, one_se, argmax."""
    num_prompts: int = 0
    num_samples: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoNPOState:
    """Where the state machine stands. With the recorded metrics after `step` it decides everything that follows."""

    branch: str
    step: int
    """Step of the newest fact on that branch."""
    phase: Phase = "TRAIN"
    stagnation_streak: int = 0
    """Consecutive steps of stagnation with falling entropy."""
    has_warned: bool = False
    num_interventions: int = 0
    """Accepted so far, the early bootstrap apart."""
    distance: int | None = None
    """D of the intervention under way."""
    until_step: int | None = None
    """Last step of the replay, of the extrapolated guidance or of the rest under way."""
    has_tried_early: bool = False
    """Whether the early bootstrap was tried."""
    is_early: bool = False
    """Whether the intervention under way is the early bootstrap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One move of the state machine, with its evidence: a line of autonpo.jsonl."""

    step: int
    event: Event
    phase_before: Phase
    state: AutoNPOState
    """After the move."""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TriggerReading:
    """What the trigger saw at one step."""

    step: int
    verdict: Literal["no_signal", "short_history", "rising", "entropy_level", "stagnant"]
    reward: float | None
    entropy: float | None
    reward_ema: float | None = None
    entropy_ema: float | None = None
    reward_gain: float | None = None
    """m_t - m_{t-W}."""
    reward_margin: float | None = None
    """c_r times the standard error of that difference."""
    entropy_drop: float | None = None
    """1 - h_t/h_{t-W}."""
    required_entropy_drop: float | None = None
    """The larger of d_H and c_H standard errors, relative to h_{t-W}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NonTriggerSpan:
    """Consecutive recorded steps that did not trigger for one and the same reason."""

    reason: str
    first_step: int
    last_step: int
    num_steps: int
    """Recorded steps in it; a log may skip some."""
