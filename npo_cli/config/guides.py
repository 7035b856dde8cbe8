"""Guide settings: how guide responses are sampled, cached, injected and replayed, and how candidates are scored.

A method is a choice of these together with `loss.*`: see `recipes/methods/` and `docs/explanation/methods.md`.
"""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from npo_cli.config.base import FORK, FORK_TRAINING, FREE, IGNORED, IS_SET, Count, Settings, Share, applies_when
from npo_cli.registry import IMPORTANCE_RATIOS, MIX_STRATEGIES


class PrefixSettings(Settings):
    """Prefix slots: only the beginning of a guide response is injected, and the policy continues it."""

    model_config = ConfigDict(json_schema_extra=FORK_TRAINING | applies_when({"guide.inject.prefix.fraction": IS_SET}))

    fraction: Share = Field(
        0.0,
        description="Fraction of a guide response's tokens that an injected rollout begins with; the policy samples "
        "the rest (0: off, whole guide responses are injected).",
        json_schema_extra=applies_when({}),
    )
    schedule: Literal["constant", "linear", "uniform"] = Field(
        "constant",
        description="The fraction: `constant`, `linear` down to 0 at the last step with the guide, or drawn for each "
        "rollout from a `uniform` distribution between 0 and `fraction`.",
    )
    weight: Share = Field(
        0.0,
        description="Weight of the prefix's tokens in the policy loss: 0 masks them (they are not counted in its mean "
        "either), 1 trains them like an injected response.",
    )

    def fraction_at(self, step: int, *, start_step: int, last_step: int) -> float:
        """`fraction` by the schedule at a step with the guide, steps (start_step, last_step].

        The k-th of n steps, from 0, has fraction (1 - k / n) with schedule=linear.
        """
        if self.schedule != "linear":
            return self.fraction
        return self.fraction * (1 - (step - start_step - 1) / (last_step - start_step))


class InjectSettings(Settings):
    """How off-policy guide responses take slots in a group, and how they enter the loss."""

    model_config = ConfigDict(json_schema_extra=FORK)

    max_accuracy: Share = Field(
        0.6, description="Inject only into groups whose on-policy accuracy is <= this (1: always)."
    )
    slots: Count = Field(1, description="Number of slots per group for guide responses.")
    mode: Annotated[str, AfterValidator(MIX_STRATEGIES.check)] = Field(
        "replace",
        description="Guide responses `replace` on-policy rollouts of the group, are added to them (`append`), or take "
        "no slots (`none`; for target.privileged=response); or one from a plug-in.",
    )
    baseline: Literal["all", "on_policy"] = Field(
        "all",
        description="Rewards that the group's mean and standard deviation are computed from: `all` rollouts, or only "
        "`on_policy` ones.",
    )
    ratio: Annotated[str, AfterValidator(IMPORTANCE_RATIOS.check)] = Field(
        "proximal",
        description="Importance ratio of injected responses. The denominator is the guide's probability (`exact`), the "
        "old policy's (`proximal`), the old policy's with a capped old/guide weight (`decoupled`), or 1 (`unit`); "
        "`none` uses no ratio; or one from a plug-in.",
    )
    decoupled_cap: float = Field(
        2.0,
        gt=0,
        description="Cap C of the old/guide weight in ratio=decoupled.",
        json_schema_extra=applies_when({"guide.inject.ratio": ["decoupled"]}),
    )
    ratio_shaping: Literal["none", "soft"] = Field(
        "none",
        description="Shaping of the injected response's ratio r (LUFFY): `none`, or r/(r + shaping_gamma) (`soft`).",
    )
    shaping_gamma: float = Field(
        0.1,
        gt=0,
        description="Constant gamma of ratio_shaping=soft.",
        json_schema_extra=applies_when({"guide.inject.ratio_shaping": ["soft"]}),
    )
    clip_off_policy: bool = Field(True, description="Clip the ratio of injected responses.")
    clip_on_policy: bool = Field(
        True, description="Clip the ratio of on-policy rollouts in batches that contain injected responses."
    )

    measure_every: Count = Field(
        1,
        description="Steps between measurements of the guide's fraction of the gradient "
        "(inject/grad_norm_fraction); the others compute injected responses together with on-policy ones.",
        json_schema_extra=IGNORED,
    )
    prefix: PrefixSettings = PrefixSettings()

    @model_validator(mode="after")
    def _has_a_ratio_to_shape(self) -> "InjectSettings":
        if self.ratio_shaping != "none" and self.ratio == "none":
            raise ValueError("guide.inject.ratio_shaping=soft needs a ratio: guide.inject.ratio must not be none")
        return self


class GuideCacheSettings(Settings):
    """How a guide source is sampled to build a guide cache, and which responses are kept."""

    model_config = ConfigDict(json_schema_extra=FREE)

    prompts: Literal["failed", "all"] = Field(
        "failed",
        description="Prompts that the guide is sampled on: those whose group, where the run recorded these steps, had "
        "an accuracy <= guide.inject.max_accuracy, and those without a record (`failed`); or `all` of the replay.",
        json_schema_extra=applies_when({"guide.cache.lazy": [False]}),
    )
    lazy: bool = Field(
        False,
        description="npo sample-guide only describes the cache; npo resume --guide samples a prompt when its group "
        "first turns out to need a guide. The guide is then in memory beside the learner; `prompts` does not apply.",
    )
    coverage: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Fraction of the steps between learner and guide, from the first, in which the guide is used. "
        "An explicit length (--steps, guide.replay.num_steps) is used whole.",
    )
    samples_per_prompt: Count = Field(8, description="Maximum number of samples per prompt.")
    samples_per_round: Count = Field(
        1, description="Samples per prompt and round; a prompt with a correct response is not sampled further."
    )
    min_yield: Share = Field(
        0.05,
        description="Stop when fewer than this fraction of the last samples are correct: further rounds of the same 64 "
        "prompts, judged by their last 32 or more samples; the whole cache, judged by the last 64 prompts (0: never).",
    )
    reuse_steps: int = Field(
        0,
        ge=0,
        description="Source checkpoint:STEP: before sampling, take correct responses that the run recorded in this "
        "many steps up to STEP (0: none). They cost no tokens, but stem from earlier policies than the one scored.",
    )
    temperature: float | None = Field(
        None, gt=0, description="Sampling temperature of the guide (null: sampling.temperature)."
    )
    select: Literal["random", "nearest", "shortest"] = Field(
        "random",
        description="Which correct response is kept: `random`, `nearest` (highest probability under the learner), or "
        "`shortest`. The last two always draw samples_per_prompt samples.",
    )
    max_responses_per_prompt: Count = Field(
        1, description="Maximum number of responses kept per prompt (> 1: always draw samples_per_prompt samples)."
    )
    min_correct: Count = Field(
        1, description="Skip prompts with fewer correct samples (> 1: always draw samples_per_prompt samples)."
    )
    keep: Literal["correct", "all"] = Field(
        "correct",
        description="Keep only verified-correct responses, or (`all`) a wrong one where no correct one was sampled.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "GuideCacheSettings":
        for key in ("max_responses_per_prompt", "min_correct"):
            if getattr(self, key) > self.samples_per_prompt:
                raise ValueError(
                    f"guide.cache.{key} must not exceed guide.cache.samples_per_prompt, "
                    f"got {getattr(self, key)} of {self.samples_per_prompt}"
                )
        return self

    @property
    def draws_all(self) -> bool:
        """Whether every prompt is sampled samples_per_prompt times, even if it is solved earlier."""
        return self.select != "random" or self.max_responses_per_prompt > 1 or self.min_correct > 1

    @property
    def draws_per_round(self) -> int:
        """Samples of an unsolved prompt per round."""
        return self.samples_per_prompt if self.draws_all else self.samples_per_round

    def count_covered(self, num_steps: int) -> int:
        """The first `coverage` of the steps of a replay, at least one."""
        return max(1, math.ceil(self.coverage * num_steps))


class EndpointSettings(Settings):
    """HTTP requests to a guide source behind an OpenAI-compatible endpoint."""

    model_config = ConfigDict(json_schema_extra=FREE)

    concurrency: Count = Field(8, description="Maximum number of concurrent requests.")
    timeout: float = Field(120.0, gt=0, description="Timeout per request in seconds.")
    max_retries: int = Field(5, ge=0, description="Retries after a transient failure (429, 5xx, broken connection).")


WITH_REPLAY = applies_when({"guide.experience.replay_fraction": IS_SET})


class ExperienceSettings(Settings):
    """ExGRPO: the run's own past successes, collected in a replay buffer and replayed during training."""

    replay_fraction: Share = Field(
        0.0, description="Fraction of a batch's prompts that come from the replay buffer (0: off)."
    )
    start_accuracy: Share = Field(
        0.35,
        description="Start collecting after the first batch whose accuracy exceeds this.",
        json_schema_extra=WITH_REPLAY,
    )
    bucket_units: Literal["count", "rate"] = Field(
        "count",
        description="Unit of a prompt's distance to half correct: number of correct rollouts (`count`), or their "
        "fraction (`rate`).",
        json_schema_extra=WITH_REPLAY,
    )
    bucket_sigma: float = Field(
        1.0,
        gt=0,
        description="Width of the Gaussian preference for half-correct prompts, in bucket_units.",
        json_schema_extra=WITH_REPLAY,
    )
    select: Literal["entropy", "nll", "random"] = Field(
        "entropy",
        description="Which stored response is replayed: lowest entropy or lowest NLL under the current policy, or "
        "`random`.",
        json_schema_extra=WITH_REPLAY,
    )
    max_per_prompt: Count = Field(
        64,
        description="Maximum number of stored responses per prompt; the oldest are dropped first.",
        json_schema_extra=WITH_REPLAY,
    )
    retire_solved: bool = Field(
        True,
        description="Do not draw prompts whose rollouts were all correct again in later epochs.",
        json_schema_extra=WITH_REPLAY,
    )


class GuideReplaySettings(Settings):
    """The fork with a guide that this recipe is about; the command line overrides it."""

    model_config = ConfigDict(json_schema_extra=FREE)

    at_step: int | None = Field(None, ge=0, description="Step to roll back to: default of --at.")
    guide_step: int | None = Field(None, ge=1, description="Checkpoint step of the guide: default of --guide.")
    num_steps: int | None = Field(
        None,
        ge=1,
        description="Number of steps with the guide (null: guide.cache.coverage of guide_step - at_step).",
    )


class GuideSettings(Settings):
    """Where guide responses come from and how they are used."""

    source: Literal["cache", "extrapolated"] = Field(
        "cache",
        description="Guide during training: a guide `cache` given to npo resume, or the `extrapolated` policy, sampled "
        "online.",
        json_schema_extra=FORK,
    )
    inject: InjectSettings = InjectSettings()
    cache: GuideCacheSettings = GuideCacheSettings()
    endpoint: EndpointSettings = EndpointSettings()
    experience: ExperienceSettings = ExperienceSettings()
    replay: GuideReplaySettings = GuideReplaySettings()


class MethodSettings(Settings):
    """What a recipe of `recipes/methods/` stands for, and the commands that run it."""

    model_config = ConfigDict(json_schema_extra=FREE | IGNORED)

    name: str = Field("grpo", description="Name of the method, shown in tables.")
    track: Literal["matched", "reference", "authors", "controls", "extrapolated"] = Field(
        "matched",
        description="Group of methods: `matched` (common GRPO core, one injected slot), `reference` (the papers' own "
        "settings), `authors` (GRPO and NPO of the NPO authors' public trainer), `controls`, or `extrapolated` guides.",
    )
    commands: tuple[str, ...] = Field(
        ("train {recipe} {run} --method {method}",),
        description="npo commands in order; npo bench fills in the placeholders in braces.",
    )
    repeat_every: int | None = Field(
        None,
        ge=1,
        description="Repeat all commands after the first every this many steps, moving {at}, {next} and {branch} "
        "(null: once).",
    )


class ScoringSettings(Settings):
    """How guide candidates are compared: Q, V and S."""

    model_config = ConfigDict(json_schema_extra=FREE)

    num_prompts: Count = Field(
        192, description="Number of training prompts that learner and candidates are sampled on."
    )
    samples_per_prompt: Count = Field(8, description="Responses per prompt, for the learner and for each candidate.")
    samples_per_round: int | None = Field(
        None,
        ge=1,
        description="pass@k: responses per prompt and round; a prompt with a correct response, whose pass@k is then "
        "known, is not sampled further (null: all samples_per_prompt at once).",
        json_schema_extra=applies_when({"scoring.quality": ["pass@k"]}),
    )
    quality: Literal["pass@1", "pass@k"] = Field("pass@k", description="Quality Q used in S.")
    quality_baseline: Literal["learner", "none"] = Field(
        "learner",
        description="What is subtracted from Q in S: the learner's own second try on the same prompts (`learner`), or "
        "nothing (`none`, as published).",
    )
    variance: Literal["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"] = Field(
        "kl_exp", description="Variance estimator V used in S."
    )
    kl_scale: float = Field(1.0, gt=0, description="kl_exp: kappa, the factor of the KL in the exponent.")
    weight_cap: float = Field(10.0, gt=1, description="Truncation C of sequence and token importance weights.")
    kl_average: Literal["sequence", "token"] = Field(
        "sequence", description="Per-token KL: mean over sequences of each sequence's mean, or mean over all tokens."
    )
    variance_exponent: float = Field(1.0, ge=0, description="Exponent alpha of V in S.")
    selection_rule: Literal["argmax", "one_se", "value"] = Field(
        "argmax",
        description="How the guide is chosen: highest S (`argmax`), one standard error rule (`one_se`), or most steps "
        "saved per cost, at least 1 (`value`). No guide is selected unless Q minus the learner's own is above 0.",
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="Total number of (candidate, prompt) pairs, spent by sequential halving (null: all pairs).",
    )
    bootstrap_resamples: Count = Field(2000, description="Number of bootstrap resamples over prompts.")

    @model_validator(mode="after")
    def _fits(self) -> "ScoringSettings":
        if self.samples_per_round is not None and self.quality != "pass@k":
            raise ValueError(
                f"scoring.samples_per_round stops at a correct response: it needs scoring.quality=pass@k, got "
                f"{self.quality}"
            )
        return self
