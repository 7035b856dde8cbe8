"""Records of AutoNPO: failed prompts, the result of a probe, and the transitions of the controller."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal[
    "TRAIN",
    "FORECAST",
    "PROBE",
    "SCOUT",
    "APPLY",
    "WINDOW",
    "GUIDE_GEN",
    "ROLLBACK",
    "REPLAY",
    "ACCEPTANCE_TEST",
    "COOLDOWN",
]
TransitionName = Literal[
    "started",
    "armed",
    "warning",
    "recovered",
    "trigger",
    "limit_reached",
    "early_bootstrap",
    "prerequisite_missing",
    "probe_accepted",
    "probe_rejected",
    "guide_built",
    "guide_empty",
    "rolled_back",
    "replay_done",
    "replay_accepted",
    "replay_rejected",
    "rung_refused",
    "rung_chosen",
    "scout_trained",
    "rung_applied",
    "window_done",
    "rung_measured",
]
ProbeStop = Literal["unsampled", "futility", "success", "complete"]
REJECTIONS: tuple[TransitionName, ...] = ("prerequisite_missing", "probe_rejected", "guide_empty", "replay_rejected")
"""Transitions that end an intervention without a lasting replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedPrompt:
    """A prompt that the policy mostly failed, and the step at which it failed."""

    prompt_id: str
    step: int
    """Training step whose rollouts failed; they were sampled from the policy of `step - 1`."""
    accuracy: float
    """Share of the group's on-policy rollouts that were correct."""
    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StratumQuality:
    """Failed prompts of one age range, and how many of them the current policy solves."""

    min_age: int
    """Smallest age in steps; failures of the newest step have age 0."""
    max_age: int
    """Exclusive upper end: a rollback of this distance replays all of these failures."""
    num_failed_prompts: int
    """Distinct prompts whose newest failure has this age."""
    num_probed: int
    num_samples: int
    num_correct: int
    quality: float
    """pass@1 of fresh samples."""
    quality_low: float
    quality_high: float
    """95 % Jeffreys interval with the effective number of trials (samples of one prompt are a cluster)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackScore:
    """Q, V and S of one rollback distance (paper section on AutoNPO; algorithms, sections 9 to 11)."""

    distance: int
    num_failed_prompts: int
    """Distinct prompts that failed in the last `distance` steps."""
    num_probed: int
    quality: float
    """Pass rate on these prompts, strata weighted by their size."""
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
    """From the current policy's samples, scored by the old checkpoint; None without samples."""
    variance_backward: float | None
    """From the old policy's recorded rollouts, scored by the current policy (section 10.7)."""
    variances_agree: bool | None
    """Whether the two intervals overlap; None if one is missing or has fewer than 32 samples."""
    has_heavy_tail: bool | None
    """E_b[w^2] and E_a[w] differ by more than two standard errors (section 10.5)."""
    kl_per_token: float
    kl_per_sequence: float
    num_backward_samples: int
    """Recorded rollouts behind `variance_backward`."""
    signal: float
    signal_low: float
    signal_high: float
    p_best: float
    """Share of paired resamples in which this distance has the largest S."""
    is_selected: bool
    quality_self: float | None = None
    """Pass rate of the old policy's own second try, from the current policy's samples by importance weighting."""
    quality_net: float | None = None
    """quality - quality_self, with the 95 % interval of the paired difference; None without importance weights."""
    quality_net_low: float | None = None
    quality_net_high: float | None = None
    steps_saved: float | None = None
    """Forecast of the replay; None where the run has no record of its steps."""
    price: float | None = None
    """Steps thrown away, guide tokens and the probe, in training steps."""
    value: float | None = None
    """steps_saved / price, with its 95 % interval."""
    value_low: float | None = None
    value_high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """Q, V and S of every rollback distance, and the decision."""

    is_accepted: bool
    reason: str
    """Why it was rejected; empty if it was accepted."""
    distance: int | None
    """D*; None if no distance could be chosen."""
    strata: tuple[StratumQuality, ...]
    scores: tuple[RollbackScore, ...]
    selection_by_profile: Mapping[str, int] = field(default_factory=dict)
    """The distance that each profile and rule selects: faithful, group2, calibrated, seq_kl, one_se, argmax, value."""
    num_prompts: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    stop: ProbeStop | None = "complete"
    """Why sampling ended; None: it continues."""
    level: float | None = None
    """One-sided error of the bounds of `quality_split` at the last look."""
    quality_split: float | None = None
    """Q of the choice (net, with scoring.quality_baseline=learner) on samples that did not make it; it decides."""
    quality_split_low: float | None = None
    quality_split_high: float | None = None
    value_split: float | None = None
    """Steps saved per step of cost, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungForecast:
    """What a rung without a probe is expected to be worth, per step that it costs."""

    rung: str
    basis: Literal["measured", "untried", "unavailable"]
    """Its effects in this run, its first use, or nothing: the rung is not available here."""
    value: float | None
    """1 + steps saved / cost; None if it is not available."""
    value_low: float | None = None
    value_high: float | None = None
    """95 % interval, of a measured one."""
    num_measured: int = 0
    """Effects that it rests on."""
    reason: str = ""
    """Why it is not taken; empty if it is."""

    @property
    def is_taken(self) -> bool:
        """Whether the rung pays, or breaks even."""
        return not self.reason


@dataclass(frozen=True, kw_only=True, slots=True)
class RungEffect:
    """What a rung was worth: the on-policy accuracy after its window, against the trend before it, at equal cost."""

    rung: str
    num_before: int
    """Steps that the trend is fitted to."""
    num_after: int
    """Steps after the window."""
    accuracy: float
    """Mean after the window."""
    accuracy_expected: float
    """The trend, extrapolated to the same cost."""
    effect: float
    """accuracy - accuracy_expected, with its 95 % interval."""
    effect_low: float
    effect_high: float
    partly_solved_gain: float
    """Share of groups with correct and wrong rollouts in the window, minus the trend, with its 95 % interval."""
    partly_solved_gain_low: float
    partly_solved_gain_high: float
    cost: float
    """Tokens of the window, of its guides, its scout and its probe, in steps of the time before."""
    rate: float
    """Accuracy gained per step on the line up to the trigger."""
    steps_saved: float
    """effect / rate: steps beyond those that it cost."""
    value: float
    """1 + steps_saved / cost, with its 95 % interval."""
    value_low: float
    value_high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoNPOState:
    """State of the controller. With the metrics recorded after `step` it determines everything that follows."""

    branch: str
    step: int
    """Step of the newest event on that branch."""
    phase: Phase = "TRAIN"
    stagnation_streak: int = 0
    """Consecutive steps of stagnation with falling entropy."""
    has_warned: bool = False
    num_interventions: int = 0
    """Rollbacks and empty guide caches so far, without the early bootstrap."""
    num_rejections: int = 0
    """Rejections in a row, the newest included; each further one doubles the cooldown."""
    distance: int | None = None
    """D of the current intervention."""
    until_step: int | None = None
    """Last step of the current replay or cooldown."""
    has_tried_early: bool = False
    """Whether the early bootstrap was tried."""
    is_early: bool = False
    """Whether the current intervention is the early bootstrap."""
    rung: str | None = None
    """Rung of the ladder that is considered, in effect or to be measured; None without a ladder."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """By rung: how often in a row it was refused or found not to pay."""
    waits: Mapping[str, int] = field(default_factory=dict)
    """By rung: the last step at which it is not considered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One transition of the controller with its evidence: a line of autonpo.jsonl."""

    step: int
    event: TransitionName
    phase_before: Phase
    state: AutoNPOState
    """After the transition."""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_rejection(self) -> bool:
        """Whether it ends an intervention without a lasting replay or window; not where another rung follows."""
        return self.event in (*REJECTIONS, "rung_refused") and self.state.phase == "COOLDOWN"


@dataclass(frozen=True, kw_only=True, slots=True)
class TriggerReading:
    """What the trigger computed at one step."""

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
    """Consecutive recorded steps that did not trigger for the same reason."""

    reason: str
    first_step: int
    last_step: int
    num_steps: int
    """Recorded steps among them; a log may skip some."""
