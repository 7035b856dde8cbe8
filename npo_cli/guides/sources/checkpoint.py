"""A checkpoint of the run answers: its weights are swapped in, and prompts are asked in rounds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from npo_cli.guides.source import (
    Pairs,
    PriorRollouts,
    PromptResponses,
    compute_logprobs,
    compute_mean_logprobs,
    sample_in_rounds,
)
from npo_cli.session.session import Session, count_generated_tokens, sample_groups
from npo_cli.storage.checkpoints import Checkpoint
from npo_cli.types.rollouts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSource:
    """Whose answers are kept, and for whom. The guide's weights are at hand whenever it is asked."""

    forwards_per_token: ClassVar[int] = 1
    session: Session
    learner: Checkpoint
    guide: Checkpoint
    prior_rollouts: PriorRollouts = field(default_factory=dict)

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Rounds of samples; a prompt that has a correct answer asks no more, unless all k are wanted."""
        return sample_policy_in_rounds(self.session, prompts, step=self.guide.step, prior_rollouts=self.prior_rollouts)

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From the trainer's pass under the guide's weights."""
        return [*compute_logprobs(self.session, pairs, temperature=self.session.recipe.guide.cache.temperature)]

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are swapped in for a moment."""
        self.session.policy.load(self.learner.path)
        near = compute_mean_logprobs(self.session, pairs)
        self.session.policy.load(self.guide.path)
        return near

    def warnings(self) -> list[str]:
        """Nothing: its tokens are the learner's."""
        return []


def sample_policy_in_rounds(
    session: Session, prompts: Sequence[Prompt], *, step: int, prior_rollouts: PriorRollouts | None = None
) -> list[PromptResponses]:
    """Rounds of samples of the weights at hand; `step` enters the seeds."""
    settings = session.recipe.guide

    def draw(now: Sequence[Prompt], slots: range) -> list[PromptResponses]:
        groups = sample_groups(
            session,
            now,
            seed_label=("guide", step),
            slots=slots,
            sampler_step=step,
            temperature=settings.cache.temperature,
        )
        return [
            PromptResponses(prompt=group.prompt, rollouts=group.rollouts, num_tokens=count_generated_tokens([group]))
            for group in groups
        ]

    return sample_in_rounds(settings, prompts, draw, prior_rollouts=prior_rollouts)
