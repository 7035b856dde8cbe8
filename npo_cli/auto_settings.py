"""The settings of AutoNPO: when to step in, how far to roll back, how to replay (algorithms, section 9).

The paper states none of these figures; the defaults are the project's own. What they mean together is told in
`guide/AUTONPO.md`. The other figures of that table are settings that every run has: train.save_every,
train.keep_anchors, score.variance, score.kappa, score.rule, guide.k, guide.select, inject.ratio, inject.gate.
"""

from typing import Literal

from pydantic import Field, model_validator

from npo_cli.settings import FORK, FREE, Count, Decay, Settings, Share


class AutoSettings(Settings):
    """When AutoNPO steps in, and which distances it may choose."""

    ema: Decay = Field(0.9, description="Decay of the averages of reward and entropy.", json_schema_extra=FREE)
    window: Count = Field(20, description="Steps W over which both averages are compared.", json_schema_extra=FREE)
    patience: Count = Field(5, description="Consecutive steps of stagnation before a warning.", json_schema_extra=FREE)
    c_r: float = Field(
        1.0,
        ge=0,
        description="Stagnation: a gain of at most this many units of noise.",
        json_schema_extra=FREE,
    )
    d_H: Share = Field(0.05, description="Entropy fell by at least this share over W.", json_schema_extra=FREE)
    c_H: float = Field(
        4.0, ge=0, description="Entropy fell by at least this many units of its noise.", json_schema_extra=FREE
    )
    warmup: int = Field(40, ge=0, description="Steps before the first warning may come.", json_schema_extra=FREE)
    cooldown: int = Field(40, ge=0, description="Steps of rest after a replay or a rejection.", json_schema_extra=FREE)
    max: int = Field(3, ge=-1, description="Most interventions of a run; -1 is no limit.", json_schema_extra=FREE)
    q_min: Share = Field(0.1, description="Accept where the lower bound of Q reaches this.", json_schema_extra=FREE)
    pool_min: Count = Field(64, description="Fewest failed prompts of a replayed segment.", json_schema_extra=FREE)
    deltas: tuple[Count, ...] = Field(
        (10, 20, 30, 40, 50, 60, 70, 80),
        min_length=1,
        description="Rollback distances to choose from; those at a checkpoint count.",
        json_schema_extra=FREE,
    )
    extrapolate: int = Field(
        0,
        ge=0,
        description="Steps that a trigger tries extrapolated guides for, before it probes; 0 is off.",
        json_schema_extra=FREE,
    )
    early: bool = Field(False, description="Begin with an early bootstrap (see early).", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _ascending(self) -> "AutoSettings":
        if list(self.deltas) != sorted(set(self.deltas)):
            raise ValueError("auto.deltas must be ascending, each distance once")
        return self


class PoolSettings(Settings):
    """The mistakes that are remembered: failed prompts with the step of their failure."""

    tau: Share = Field(
        0.25,
        description="A group of at most this accuracy is a mistake; 0: all wrong.",
        json_schema_extra=FREE,
    )
    size: Count = Field(20_000, description="Most mistakes kept; the oldest leave first.", json_schema_extra=FREE)


class ProbeSettings(Settings):
    """The confirmation: can the policy now solve what it failed on the way?"""

    prompts: Count = Field(256, description="Failed prompts asked again, stratified by age.", json_schema_extra=FREE)
    k: Count = Field(4, description="Samples a prompt.", json_schema_extra=FREE)
    direction: Literal["guide", "learner"] = Field(
        "guide",
        description="Samples behind V: the present policy's, seen by each old checkpoint; or the old ones on record.",
        json_schema_extra=FREE,
    )


class RollbackSettings(Settings):
    """What a rollback takes back."""

    optimizer: Literal["restored", "reset", "keep_current"] = Field(
        "restored", description="Optimiser state of the old step, none, or that of the guide.", json_schema_extra=FORK
    )
    data: Literal["same", "onward"] = Field(
        "same", description="Prompts of the replay: the same again, or those that come next.", json_schema_extra=FORK
    )
    seed: Literal["fresh", "same"] = Field("fresh", description="Sampling seeds of the replay.", json_schema_extra=FORK)


class ReplaySettings(Settings):
    """What a replay leads to."""

    after: Literal["continue", "stop"] = Field(
        "continue", description="After the replay: go on with GRPO, or end there.", json_schema_extra=FREE
    )
    accept_test: bool = Field(
        False,
        description="Keep the replayed branch only if a paired held-out test does not find it worse.",
        json_schema_extra=FREE,
    )


class EarlySettings(Settings):
    """Early bootstrapping: a short scout from the base teaches a new start."""

    scout: Count = Field(20, description="Steps of the scout.", json_schema_extra=FREE)
    window: Count = Field(20, description="Steps in which the scout's answers are mixed in.", json_schema_extra=FREE)


class LateSettings(Settings):
    """A late breakthrough by hand."""

    delta: Count = Field(
        70,
        description="Length of the segment that `npo autonpo --explain` proposes from a plateau's start.",
        json_schema_extra=FREE,
    )
