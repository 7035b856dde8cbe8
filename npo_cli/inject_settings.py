"""The settings of foreign trajectories: where they come from, how they take slots, how they are charged.

A method of the paper's table is a choice of these, with `loss.*`: see `recipes/methods/` and `guide/METHODS.md`.
"""

from typing import Literal

from pydantic import Field, model_validator

from npo_cli.settings import FORK, FREE, Count, Settings, Share


class InjectSettings(Settings):
    """How foreign trajectories take slots in a group, and how those are charged."""

    gate: Share = Field(
        0.6,
        description="Slots are given where the group's own accuracy is at most this; 1 is no gate.",
        json_schema_extra=FORK,
    )
    slots: Count = Field(1, description="Slots of a group that are given away.", json_schema_extra=FORK)
    compose: Literal["replace", "append"] = Field(
        "replace", description="Slots are taken from the policy's own, or added to them.", json_schema_extra=FORK
    )
    baseline: Literal["all", "own"] = Field(
        "all", description="Whose rewards make the group's mean and deviation.", json_schema_extra=FORK
    )
    ratio: Literal["exact", "proximal", "decoupled", "unit", "none"] = Field(
        "exact", description="Importance ratio of the injected slot.", json_schema_extra=FORK
    )
    decoupled_cap: float = Field(
        2.0, gt=0, description="Cap C of the decoupled weight old/guide.", json_schema_extra=FORK
    )
    shape: Literal["none", "soft"] = Field(
        "none", description="Ratio r of the injected slot as it is, or r/(r + gamma).", json_schema_extra=FORK
    )
    gamma: float = Field(0.1, gt=0, description="Constant of the soft shape.", json_schema_extra=FORK)
    clip: bool = Field(True, description="Clip the injected slot like any other.", json_schema_extra=FORK)
    clip_own: bool = Field(
        True, description="Clip the policy's own slots in a batch with injected ones.", json_schema_extra=FORK
    )

    @model_validator(mode="after")
    def _charges_once(self) -> "InjectSettings":
        if self.shape != "none" and self.ratio == "none":
            raise ValueError("inject.shape=soft shapes a ratio, and inject.ratio=none has none")
        return self


class GuideSettings(Settings):
    """How a source is asked for its answers, and which are kept."""

    source: Literal["cache", "extrapolated"] = Field(
        "cache",
        description="Who guides training: a cache given to npo resume, or the policy pushed along its own motion.",
        json_schema_extra=FORK,
    )
    k: Count = Field(8, description="Most samples a prompt.", json_schema_extra=FREE)
    round: Count = Field(
        2,
        description="Samples a prompt drawn before looking whether one is correct; a solved prompt asks no more.",
        json_schema_extra=FREE,
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="Temperature of a guide's samples; null takes sampling.temperature.",
        json_schema_extra=FREE,
    )
    select: Literal["random", "nearest", "shortest"] = Field(
        "random", description="Which correct sample is kept. nearest and shortest draw all k.", json_schema_extra=FREE
    )
    per_prompt: Count = Field(
        1, description="Most trajectories kept a prompt; more than one draws all k.", json_schema_extra=FREE
    )
    min_correct: Count = Field(
        1,
        description="Prompts with fewer correct samples are left out; more than one draws all k.",
        json_schema_extra=FREE,
    )
    keep: Literal["correct", "all"] = Field(
        "correct",
        description="Keep verified-correct answers only, or with `all` a wrong one where there is no right one.",
        json_schema_extra=FREE,
    )

    concurrency: Count = Field(8, description="endpoint: requests under way at the same time.", json_schema_extra=FREE)
    timeout: float = Field(
        120.0, gt=0, description="endpoint: seconds that one answer may take.", json_schema_extra=FREE
    )
    retries: int = Field(
        5,
        ge=0,
        description="endpoint: further tries after a refusal that may pass (429, 5xx, a broken connection).",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _fits(self) -> "GuideSettings":
        for key in ("per_prompt", "min_correct"):
            if getattr(self, key) > self.k:
                raise ValueError(f"guide.{key} must not exceed guide.k, got {getattr(self, key)} of {self.k}")
        return self

    @property
    def draws_all(self) -> bool:
        """Whether a prompt is asked k times even if it is solved before."""
        return self.select != "random" or self.per_prompt > 1 or self.min_correct > 1


class ExperienceSettings(Settings):
    """ExGRPO: the run's own past successes, collected and replayed while it trains."""

    share: Share = Field(0.0, description="Share of a batch's prompts that are replayed ones; 0 is off.")
    start: Share = Field(0.35, description="Collection begins after a batch with more than this success rate.")
    bucket_units: Literal["count", "rate"] = Field(
        "count", description="Unit of the distance to half right: correct rollouts, or their share."
    )
    bucket_sigma: float = Field(1.0, gt=0, description="Width of the preference for half-right prompts, in that unit.")
    select: Literal["entropy", "nll", "random"] = Field(
        "entropy", description="Which stored answer: least entropy or least NLL under the present policy, or any."
    )
    retire: bool = Field(True, description="A prompt whose every slot was correct is not drawn in later epochs.")


class MethodSettings(Settings):
    """What a recipe of `recipes/methods/` stands for, and the commands that make a run of it."""

    name: str = Field("grpo", description="Name of the method, shown in tables.", json_schema_extra=FREE)
    track: Literal["matched", "reference", "controls", "extrapolated"] = Field(
        "matched",
        description="Common GRPO core with one injected slot, own knobs, a control, or the policy's own motion.",
        json_schema_extra=FREE,
    )
    plan: tuple[str, ...] = Field(
        ("train {recipe} --method {method} --run {run}",),
        description="npo commands in order; npo bench fills in what stands in braces.",
        json_schema_extra=FREE,
    )
    stretch: int | None = Field(
        None,
        ge=1,
        description="Repeat the plan's commands after the first every so many steps; {at} and {next} move on.",
        json_schema_extra=FREE,
    )
