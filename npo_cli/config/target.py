"""Settings of dense targets: a teacher's probabilities at every token of the policy's own rollouts.

See `docs/explanation/dense-targets.md`.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from npo_cli.config.base import FORK_TRAINING, IS_SET, Count, Settings, applies_when, find_window_place
from npo_cli.registry import GUIDE_SOURCES, TARGETS

DISTRIBUTION = applies_when({"target.kind": ["distribution"]})
ALWAYS = applies_when({})
OWN_POLICY = "policy"
"""The value of `target.teacher` that is no guide source."""


def name_of_source(spec: str) -> str:
    """The guide source of a SPEC: a bare step is short for `checkpoint:STEP`."""
    return "checkpoint" if spec.isdecimal() else spec.partition(":")[0]


class TargetSettings(Settings):
    """Dense targets: distillation from a teacher, token by token, on the policy's own rollouts."""

    model_config = ConfigDict(
        json_schema_extra=FORK_TRAINING | applies_when({"target.kind": ["token_weight", "distribution"]})
    )

    kind: Annotated[str, AfterValidator(TARGETS.check)] = Field(
        "none",
        description="What the teacher does: nothing (`none`), weigh each token's advantage (`token_weight`, RLSD), or "
        "add the divergence of the policy's next-token distributions from its own (`distribution`, on-policy "
        "distillation); or one from a plug-in.",
        json_schema_extra=ALWAYS,
    )
    teacher: str | None = Field(
        None,
        description="Guide source SPEC of the teacher: checkpoint:STEP, earlier:STEP, base, self or "
        "extrapolated:SPACE,k=K,a=A of the line that the branch was forked from; run:DIR@STEP, model:FOLDER_OR_ID, or "
        "endpoint:URL#MODEL of a vLLM server, with the policy's tokenizer; or `policy`, the policy itself at each "
        "step, with `privileged` or `temperature`.",
    )
    privileged: str | None = Field(
        None,
        description="What the teacher is shown beside the prompt, and the policy is not: `response`, a verified "
        "response of the guide cache (--guide NAME); `answer`, the reference answer; or another column of the data "
        "(null: nothing).",
    )
    template: str = Field(
        "{prompt}\n\nA correct solution:\n{privileged}\n\nNow solve it yourself.",
        description="privileged: what the teacher reads in the prompt's place, of chat messages in that of the last "
        "one.",
        json_schema_extra=ALWAYS,
    )
    unfilled: Literal["skip", "plain"] = Field(
        "skip",
        description="privileged: responses to prompts without such a text have no target (`skip`), or the teacher "
        "reads the prompt alone (`plain`).",
        json_schema_extra=applies_when({"target.privileged": IS_SET}),
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="Temperature of the teacher's probabilities (null: sampling.temperature). A higher one makes them "
        "flatter than the teacher samples.",
    )
    weight: float = Field(
        1.0,
        ge=0,
        description="distribution: coefficient of the divergence in the loss. token_weight: fraction lambda of the "
        "advantage that is weighted, at most 1.",
    )
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="Course of `weight` in the window: `constant`, or `linear` down to 0 at its end."
    )
    start_step: int | None = Field(
        None, ge=0, description="The window begins after this step (null: where the branch was forked)."
    )
    num_steps: int | None = Field(
        None, ge=1, description="Length of the window in steps; then training has no target (null: to the end)."
    )
    group_size: int | None = Field(
        None, ge=2, description="Number of rollouts per prompt in the window (null: train.group_size)."
    )
    rollouts: Literal["wrong", "all"] | None = Field(
        None,
        description="Which of the policy's own rollouts have a target: those that are not correct (`wrong`), or `all` "
        "(null: wrong for distribution, all for token_weight).",
    )
    policy_gradient: bool = Field(
        True,
        description="distribution: keep the policy gradient in the window (false: the divergence alone).",
        json_schema_extra=DISTRIBUTION,
    )
    divergence: Literal["forward", "reverse", "js"] = Field(
        "forward",
        description="distribution: KL(teacher || policy) (`forward`), KL(policy || teacher) (`reverse`), or the "
        "Jensen-Shannon divergence (`js`).",
        json_schema_extra=DISTRIBUTION,
    )
    top_k: Count | None = Field(
        None,
        description="distribution: compare the teacher's K most probable tokens and the sum of all others (null: the "
        "full vocabulary).",
        json_schema_extra=DISTRIBUTION,
    )
    clip_range: float = Field(
        0.2,
        gt=0,
        le=1,
        description="token_weight: range e; weights are clipped to [1 - e, 1 + e].",
        json_schema_extra=applies_when({"target.kind": ["token_weight"]}),
    )

    @field_validator("template")
    @classmethod
    def _has_both_places(cls, template: str) -> str:
        missing = [name for name in ("{prompt}", "{privileged}") if name not in template]
        if missing:
            raise ValueError(f"target.template has no {missing[0]}")
        return template

    @model_validator(mode="after")
    def _fits(self) -> "TargetSettings":
        if self.kind == "none":
            return self
        if self.teacher is None:
            raise ValueError(f"target.kind={self.kind} needs a teacher: set target.teacher=SPEC")
        if self.is_self_taught and self.privileged is None and self.temperature is None:
            raise ValueError(
                "target.teacher=policy teaches the policy what it knows: set target.privileged or target.temperature"
            )
        if not self.is_self_taught and name_of_source(self.teacher) not in GUIDE_SOURCES.names():
            known = GUIDE_SOURCES.suggest(name_of_source(self.teacher))
            raise ValueError(f"target.teacher={self.teacher[:60]} is not a known guide source: {known}")
        if self.schedule == "linear" and self.num_steps is None:
            raise ValueError("target.schedule=linear needs the length of the window: set target.num_steps")
        if self.kind == "token_weight" and self.weight > 1:
            raise ValueError(f"target.weight must be at most 1 with target.kind=token_weight, got {self.weight:g}")
        return self

    @property
    def is_self_taught(self) -> bool:
        """Whether the teacher is the policy itself, with the weights of each update."""
        return self.teacher == OWN_POLICY

    @property
    def shows_response(self) -> bool:
        """Whether the teacher is shown a response of a guide cache."""
        return self.privileged == "response"

    def find_last_step(self, *, fork_step: int) -> int | None:
        """Last step of the window on a branch that was forked at `fork_step`; None: the window has no end."""
        if self.num_steps is None:
            return None
        return (fork_step if self.start_step is None else self.start_step) + self.num_steps

    def coefficient_at(self, step: int, *, start_step: int) -> float | None:
        """`weight` by the schedule at a training step; None outside the window (start_step, start_step + num_steps].

        The k-th of n steps, from 0, has weight * (1 - k / n) with schedule=linear.
        """
        place = find_window_place(step, start_step, self.num_steps)
        if self.kind == "none" or place is None:
            return None
        return self.weight * (1 - place / self.num_steps) if self.schedule == "linear" else self.weight
