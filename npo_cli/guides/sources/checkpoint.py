"""Checkpoints of the run as guides; those of the learner's own line: a later step, the learner itself, step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.source import (
    GuideSource,
    OptionValue,
    Pairs,
    PromptResponses,
    ReplayTarget,
    compute_logprobs,
    compute_mean_logprobs,
    filter_correct,
    make_spec,
    responses_per_prompt,
    sample_in_rounds,
)
from npo_cli.types.guides import SourceSpec
from npo_cli.types.rollouts import Prompt, Rollout

if TYPE_CHECKING:
    from npo_cli.config.recipe import ModelSettings
    from npo_cli.policy.model import Policy
    from npo_cli.session.session import Session
    from npo_cli.storage.checkpoints import Checkpoint
    from npo_cli.tasks.task import Task


class SampledCheckpoint(GuideSource):
    """A checkpoint of the run, whose weights take the learner's place in the session; `validate` sets `checkpoint`.

    A subclass that counts responses by a rule of its own extends `draw`.
    """

    uses_engine = True
    has_distribution = True
    is_of_run = True

    def __init__(self, spec: SourceSpec, target: ReplayTarget) -> None:
        super().__init__(spec, target)
        self.checkpoint: Checkpoint
        self.prior_rollouts: Mapping[str, Sequence[Rollout]] = {}
        """Responses of the guide that exist already, by prompt id; they count as its first samples."""
        self.guide_session: Session
        """Holds the guide's weights; set by `open`."""

    @property
    def guide_step(self) -> int:
        """Step of the checkpoint."""
        return self.checkpoint.step

    def fingerprint(self) -> str:
        """Digest of the weights."""
        return self.checkpoint.digest

    def check(self, task: Task, policy: Policy) -> Sequence[str]:
        """Its files are complete; no engine is started."""
        from npo_cli.storage.checkpoints import verify_checkpoint

        verify_checkpoint(self.checkpoint)
        return ()

    def open(self, session: Session) -> None:
        """Load the guide's weights into the session's policy."""
        from npo_cli.session.session import load_checkpoint

        super().open(session)
        load_checkpoint(session.policy, self.checkpoint)
        self.guide_session = session

    @property
    def seed_label(self) -> tuple[str | int, ...]:
        """Part of the seed of every response."""
        return self.target.purpose, self.checkpoint.step

    @property
    def model_settings(self) -> ModelSettings:
        """Of the guide: the learner's."""
        return self.target.learner.recipe.model

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """In rounds, until a prompt is solved or all samples are drawn."""
        return sample_in_rounds(self.session.recipe.guide, prompts, self.draw, prior_rollouts=self.prior_rollouts)

    def draw(self, prompts: Sequence[Prompt], slots: range) -> list[PromptResponses]:
        """One verified response to each prompt per slot."""
        from npo_cli.session.session import sample_groups

        groups = sample_groups(
            self.guide_session,
            prompts,
            seed_label=self.seed_label,
            slots=slots,
            sampler_step=self.checkpoint.step,
            temperature=self.session.recipe.guide.cache.temperature,
        )
        return [
            replace(entry, rollouts=tuple(replace(rollout, source="guide") for rollout in entry.rollouts))
            for entry in responses_per_prompt(groups)
        ]

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From the trainer's forward pass with the guide's weights; of recorded responses as recorded."""
        step, temperature = self.checkpoint.step, self.session.recipe.guide.cache.temperature
        sampled = [pair for pair in pairs if pair[1].sampler_step == step]
        logps = iter(compute_logprobs(self.guide_session, sampled, temperature=temperature))
        return [next(logps) if rollout.sampler_step == step else rollout.behavior_logps for _, rollout in pairs]

    def load_teacher(self) -> Policy:
        """A second model with the checkpoint's weights, or adapters."""
        from npo_cli.policy.model import load_policy
        from npo_cli.storage.checkpoints import verify_checkpoint

        verify_checkpoint(self.checkpoint)
        return load_policy(self.model_settings, self.checkpoint.path)

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are loaded for this pass."""
        self.session.policy.load(self.target.learner.checkpoint.path)
        means = compute_mean_logprobs(self.session, pairs)
        self.session.policy.load(self.checkpoint.path)
        return means


class LineCheckpoint(SampledCheckpoint):
    """A checkpoint of the learner's line, as it is: scoring samples its weights without calling the source."""

    def __init_subclass__(cls) -> None:
        """Raise TypeError for a subclass with a way of sampling of its own, which scoring would ignore."""
        super().__init_subclass__()
        for method in ("sample", "draw", "logprobs"):
            if method in vars(cls):
                raise TypeError(f"scoring does not call {cls.__name__}.{method}: derive it from SampledCheckpoint")


def parse_step(source: type[GuideSource], argument: str) -> int:
    """The STEP of a SPEC."""
    if not argument.isdecimal():
        raise NpoError(f"{source.name}:{argument}: the step must be a whole number", f"use {source.usage}")
    return int(argument)


class CheckpointSource(LineCheckpoint):
    """A later checkpoint of the run."""

    name = "checkpoint"
    usage = "checkpoint:STEP"
    example = "checkpoint:100"
    summary = "a later checkpoint; a bare STEP is short for it"
    options: ClassVar[Mapping[str, str]] = {"step": "step of the checkpoint, later than the learner's"}
    optional = frozenset({"step"})

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """`STEP`; nothing is guide.replay.guide_step of the recipe."""
        if not argument:
            return {}
        return {"step": parse_step(cls, argument)}

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """`STEP`."""
        return str(options.get("step", ""))

    def validate(self) -> None:
        """The step is later than the learner's, and saved."""
        from npo_cli.session.learner import find_later_checkpoint

        run, learner = self.target.run, self.target.learner
        step = self.spec.options.get("step", learner.recipe.guide.replay.guide_step)
        if step is None:
            raise NpoError(
                "no guide was given: the recipe has no guide.replay.guide_step",
                f"add --source STEP; to choose one: npo score-checkpoints {quote_path(run.root)} --at {learner.step}",
            )
        self.checkpoint = find_later_checkpoint(run, learner, int(step))
        self.spec = make_spec(self.name, {"step": self.checkpoint.step})

    @property
    def default_label(self) -> str:
        """The step."""
        return str(self.guide_step)

    def reuse_recorded(self, prompts: Sequence[Prompt]) -> None:
        """Take the correct responses of the last guide.cache.reuse_steps steps up to the guide as first samples."""
        from npo_cli.guides.sources.own_history import read_own_rollouts

        num_steps = self.session.recipe.guide.cache.reuse_steps
        if not num_steps:
            return
        wanted = {prompt.prompt_id for prompt in prompts}
        found = read_own_rollouts(
            self.target.run,
            self.target.learner.branch,
            after=self.guide_step - num_steps,
            at=self.guide_step,
            prompt_ids=wanted,
            source="guide",
        )
        self.prior_rollouts = {prompt_id: filter_correct(rollouts) for prompt_id, rollouts in found.items()}


class SelfSource(LineCheckpoint):
    """The learner itself."""

    name = "self"
    usage = "self"
    example = "self"
    summary = "the learner itself, a control"

    def validate(self) -> None:
        """Always available."""
        self.checkpoint = self.target.learner.checkpoint


class EarlierSource(LineCheckpoint):
    """An earlier checkpoint of the run: the replayed past that the near future is compared with."""

    name = "earlier"
    usage = "earlier:STEP"
    example = "earlier:20"
    summary = "an earlier checkpoint of the run, a control"
    options: ClassVar[Mapping[str, str]] = {"step": "step of the checkpoint, earlier than the learner's"}

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """`STEP`."""
        return {"step": parse_step(cls, argument)}

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """`STEP`."""
        return str(options["step"])

    def validate(self) -> None:
        """The step is earlier than the learner's, and saved."""
        from npo_cli.storage.checkpoints import find_checkpoint

        run, learner, step = self.target.run, self.target.learner, int(self.spec.options["step"])
        if step >= learner.step:
            raise NpoError(
                f"step {step} is not earlier than the learner's step {learner.step}",
                f"a later checkpoint is checkpoint:{step}; steps: npo index {quote_path(run.root)}",
            )
        self.checkpoint = find_checkpoint(run, learner.branch, step)


class BaseSource(LineCheckpoint):
    """Step 0 of the run."""

    name = "base"
    usage = "base"
    example = "base"
    summary = "step 0 of the run, a control"

    def validate(self) -> None:
        """Step 0 is saved."""
        from npo_cli.storage.checkpoints import find_checkpoint

        self.checkpoint = find_checkpoint(self.target.run, self.target.learner.branch, 0)
