"""The learner pushed along its own motion as an author: no later checkpoint is needed, and nothing is rolled back."""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.extrapolation.sampler import (
    ExtrapolatedSampler,
    ResolvedExtrapolation,
    load_older_policy,
    open_extrapolated_sampler,
)
from npo_cli.guides.registry import ResolvedSource, SourceHandle, open_session_without_engine
from npo_cli.guides.source import Pairs, PromptResponses, compute_mean_logprobs, sample_in_rounds
from npo_cli.policy.model import Policy
from npo_cli.session.session import Session, build_session
from npo_cli.tasks.task import Task
from npo_cli.types.rollouts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolatedSource:
    """Answers of the pushed policy, in rounds; the learner's weights are at hand between them."""

    session: Session
    sampler: ExtrapolatedSampler
    label: tuple[str | int, ...]

    @property
    def forwards_per_token(self) -> int:
        """2 in logits: the older model reads each token as well."""
        return self.sampler.forwards_per_token

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Rounds of samples; a prompt that has a correct answer asks no more, unless all k are wanted."""
        settings = self.session.recipe.guide

        def draw(now: Sequence[Prompt], slots: range) -> list[PromptResponses]:
            groups = self.sampler.sample_groups(
                now, label=self.label, slots=slots, temperature=settings.cache.temperature
            )
            return [
                PromptResponses(
                    prompt=group.prompt,
                    rollouts=group.rollouts,
                    num_tokens=sum(len(rollout.response_ids) for rollout in group.rollouts),
                )
                for group in groups
            ]

        return sample_in_rounds(settings, prompts, draw)

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From the trainer's pass under the pushed policy."""
        return [*self.sampler.logprobs(pairs, temperature=self.session.recipe.guide.cache.temperature)]

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner."""
        return compute_mean_logprobs(self.session, pairs)

    def warnings(self) -> list[str]:
        """Nothing: its tokens are the learner's."""
        return []


def open_extrapolated(plan: ResolvedSource, task: Task, policy: Policy) -> SourceHandle:
    """In logits beside no engine, in weights with the run's own."""
    motion = plan.extrapolation
    assert motion is not None
    in_logits = motion.spec.space == "logits"
    recipe = plan.learner.recipe
    session = (
        open_session_without_engine(plan, task, policy)
        if in_logits
        else build_session(plan.run, recipe, task=task, policy=policy, extrapolates_weights=True)
    )
    return SourceHandle(
        resolved=plan,
        session=session,
        source=ExtrapolatedSource(
            session=session,
            sampler=open_extrapolated_sampler(session, motion, older=load_older_policy(session, motion)),
            label=(plan.purpose, "extrapolated", motion.spec.name, motion.step),
        ),
        digest=motion.older_checkpoint.digest,
        tokenizer_digest=policy.tokenizer_digest,
        origin=describe_extrapolation(motion),
    )


def describe_extrapolation(motion: ResolvedExtrapolation) -> str:
    """`logits:20:2 of steps 80 and 60`; how it is asked for stands before the ` of `."""
    return f"{motion.spec.name} of steps {motion.step} and {motion.older_checkpoint.step}"
