"""AutoNPO's settings: when it triggers, how it probes, how far it rolls back, how it replays (algorithms, section 9).

The paper states none of these values; the defaults are this project's, explained in `docs/explanation/autonpo.md`.
AutoNPO also reads train.save_every, train.keep_full_checkpoints, scoring.*, guide.cache.* and guide.inject.*.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from npo_cli.config.base import FORK, FREE, Count, Decay, Settings, Share, applies_when
from npo_cli.registry import RUNGS

PUBLISHED_LADDER = ("rollback",)
"""AutoNPO as published: one intervention, the rollback."""
EARLY_RUNG = "scout"
"""The rung that an early bootstrap with a disposable scout is, in the ladder or not."""


class TriggerSettings(Settings):
    """When AutoNPO triggers: the reward stagnates while the entropy falls."""

    model_config = ConfigDict(json_schema_extra=FREE)

    ema_decay: Decay = Field(0.9, description="Decay of the exponential moving averages of reward and entropy.")
    window: Count = Field(20, description="Window W in steps over which the moving averages are compared.")
    patience: Count = Field(5, description="Consecutive steps of stagnation with falling entropy that trigger.")
    max_reward_gain_se: float = Field(
        1.0,
        ge=0,
        description="c_r: the reward stagnates if its gain over the window is at most this many standard errors.",
    )
    min_entropy_drop: Share = Field(
        0.05, description="d_H: the entropy falls if it drops by at least this fraction over the window."
    )
    min_entropy_drop_se: float = Field(
        4.0,
        ge=0,
        description="c_H: the entropy falls if it drops by at least this many standard errors over the window.",
    )
    warmup_steps: int = Field(40, ge=0, description="Steps before the first trigger.")
    cooldown_steps: int = Field(
        40,
        ge=0,
        description="Steps without a trigger after a replay or a rejection; doubled with each further rejection in a "
        "row.",
    )


class PoolSettings(Settings):
    """The pool of failed prompts, each with the step at which it failed."""

    model_config = ConfigDict(json_schema_extra=FREE)

    max_accuracy: Share = Field(
        0.25, description="Add a prompt if its group's accuracy is <= this (0: all responses wrong)."
    )
    max_size: Count = Field(20_000, description="Maximum number of failed prompts; the oldest are dropped first.")


class ProbeSettings(Settings):
    """The probe after a trigger: does the current policy now solve prompts that it failed earlier?"""

    model_config = ConfigDict(json_schema_extra=FREE)

    num_prompts: Count = Field(
        256,
        description="Failed prompts sampled again, stratified by age; fewer if the test is decided after a quarter, a "
        "half or three quarters of them.",
    )
    samples_per_prompt: Count = Field(4, description="Responses per prompt.")
    min_quality: Share | None = Field(
        None,
        description="Accept the probe if the lower confidence bound of Q is >= this (null: above 0 for Q net of the "
        "old policy's second try; 0.1 for Q itself, with scoring.quality_baseline=none).",
    )
    variance_samples: Literal["guide", "learner"] = Field(
        "guide",
        description="Samples that V is estimated from: `guide` (the current policy's responses, scored by each old "
        "checkpoint) or `learner` (rollouts recorded at the old steps).",
    )


class RollbackSettings(Settings):
    """How far a rollback goes, and which state it restores. The restored state applies to any fork."""

    model_config = ConfigDict(json_schema_extra=FORK)

    distances: tuple[Count, ...] = Field(
        (10, 20, 30, 40, 50, 60, 70, 80),
        min_length=1,
        description="Candidate rollback distances in steps; only those that reach a checkpoint are used.",
        json_schema_extra=FREE,
    )
    selection_rule: Literal["value", "argmax", "one_se"] = Field(
        "value",
        description="How the distance is chosen: most steps saved per cost (`value`), highest S (`argmax`, as "
        "published), one standard error rule (`one_se`).",
        json_schema_extra=FREE,
    )
    min_value: float = Field(
        1.0,
        ge=0,
        description="Minimum forecast of steps saved per step of cost: a rollback below it is rejected (0: no limit).",
        json_schema_extra=FREE,
    )
    min_failed_prompts: Count = Field(
        64,
        description="Minimum number of failed prompts in the replayed segment for a distance to be a candidate.",
        json_schema_extra=FREE,
    )
    optimizer: Literal["restored", "reset", "keep_current"] = Field(
        "restored",
        description="Optimizer state after a fork: `restored` from the checkpoint, `reset`, or the guide's "
        "(`keep_current`).",
    )
    data: Literal["same", "onward"] = Field(
        "same", description="Prompts of the replay: the `same` as in the original segment, or the next ones (`onward`)."
    )
    seed: Literal["fresh", "same"] = Field(
        "fresh", description="Sampling seeds of the replay: new, or those of the original segment."
    )

    @model_validator(mode="after")
    def _ascending(self) -> "RollbackSettings":
        if list(self.distances) != sorted(set(self.distances)):
            raise ValueError("autonpo.rollback.distances must be ascending, without duplicates")
        return self


class ReplaySettings(Settings):
    """What AutoNPO does with a replayed branch."""

    model_config = ConfigDict(json_schema_extra=FREE)

    after: Literal["continue", "stop"] = Field(
        "continue", description="After the replay: continue GRPO training, or stop."
    )
    acceptance_test: bool = Field(
        False, description="Keep the replayed branch only if a paired held-out test does not find it worse."
    )
    suggested_steps: Count = Field(
        70,
        description="Segment length that `npo autonpo --explain` suggests for a manual replay from a plateau's start.",
    )


class EarlySettings(Settings):
    """Early bootstrap: a short scout run from the base model guides a restart from the base model."""

    model_config = ConfigDict(json_schema_extra=FREE)

    enabled: bool = Field(False, description="Start AutoNPO with an early bootstrap.")
    scout: Literal["run", "disposable"] = Field(
        "run",
        description="The scout: the first steps of the `run` itself, whose responses are injected after a restart from "
        "step 0 (as published); or a `disposable` one with the recipe's scout.*, trained before the first step, which "
        "is the teacher of a dense target (rung `scout` at step 0).",
    )
    scout_steps: Count = Field(20, description="Training steps of the scout.")
    replay_steps: Count = Field(
        20,
        description="Steps from step 0 in which the run learns from the scout: its responses are injected, or (scout "
        "`disposable`) it is the teacher.",
    )


class RungSettings(Settings):
    """What the rungs of the ladder below the rollback do, each for a window of steps on a new branch."""

    model_config = ConfigDict(json_schema_extra=FREE)

    num_steps: Count = Field(
        20,
        description="Length of a window in steps; of `dense` at most the distance of its rollback.",
        json_schema_extra=applies_when({"autonpo.ladder": ["mistakes", "token_weight", "guide", "scout", "dense"]}),
    )
    mistakes: float = Field(
        0.5,
        gt=0,
        le=1,
        description="mistakes: order.mistakes in the window.",
        json_schema_extra=applies_when({"autonpo.ladder": ["mistakes"]}),
    )
    teacher: str | None = Field(
        None,
        description="token_weight: guide source SPEC of the teacher (null: the checkpoint of the line with the highest "
        "average reward, if that is above the present one by more than the trigger's noise).",
        json_schema_extra=applies_when({"autonpo.ladder": ["token_weight"]}),
    )
    guide: str = Field(
        "extrapolated:logits,k=20,a=1",
        description="guide: guide source SPEC, sampled while training for the groups that pass "
        "guide.inject.max_accuracy.",
        json_schema_extra=applies_when({"autonpo.ladder": ["guide"]}),
    )
    scout_steps: Count = Field(
        20,
        description="scout: training steps of the disposable scout; its other settings are scout.*.",
        json_schema_extra=applies_when({"autonpo.ladder": ["scout"]}),
    )
    group_size: int = Field(
        2,
        ge=2,
        description="scout (also of an early bootstrap) and dense: rollouts per prompt in the window.",
    )


class AutonpoSettings(Settings):
    """AutoNPO: automatic interventions (trigger, probe, rollback, guided replay)."""

    max_interventions: int = Field(
        3,
        ge=-1,
        description="Maximum number of interventions per run, those whose guide cache came out empty included (-1: no "
        "limit).",
        json_schema_extra=FREE,
    )
    ladder: tuple[Annotated[str, AfterValidator(RUNGS.check)], ...] = Field(
        PUBLISHED_LADDER,
        description="Interventions that a trigger may lead to, cheapest first; the first forecast to pay is made: "
        "`mistakes` (mistakes first), `token_weight` (token weights from a better checkpoint), `guide` (guides without "
        "a rollback), `scout` (dense target from a disposable scout), `dense` (short rollback, dense target), "
        "`rollback` (as published); or one from a plug-in.",
        json_schema_extra=FREE,
    )
    rungs: RungSettings = RungSettings()
    trigger: TriggerSettings = TriggerSettings()
    pool: PoolSettings = PoolSettings()
    probe: ProbeSettings = ProbeSettings()
    rollback: RollbackSettings = RollbackSettings()
    replay: ReplaySettings = ReplaySettings()
    early: EarlySettings = EarlySettings()

    @model_validator(mode="after")
    def _rungs_differ(self) -> "AutonpoSettings":
        if not self.ladder:
            raise ValueError("autonpo.ladder must name at least one rung: autonpo.max_interventions=0 makes none")
        if len(set(self.ladder)) < len(self.ladder):
            raise ValueError("autonpo.ladder must not name a rung twice")
        return self

    @property
    def is_published(self) -> bool:
        """Whether the rollback is the only intervention."""
        return self.ladder == PUBLISHED_LADDER
