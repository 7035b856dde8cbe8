"""Somebody whose answers are kept: what is asked of an author, and the forward passes that charge answers to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from npo_cli.policy.logprobs import TokenRow
from npo_cli.policy.model import Policy
from npo_cli.records import Prompt, Rollout
from npo_cli.stages.row_scores import row_scores
from npo_cli.stages.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What was said to one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    num_known: int = 0
    """How many of them, the first ones, were not generated for this cache."""

    @property
    def correct(self) -> list[Rollout]:
        """Verified-correct and ended by themselves."""
        return [rollout for rollout in self.rollouts if rollout.verdict == "correct" and rollout.finished]

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated for this cache."""
        return sum(len(rollout.response_ids) for rollout in self.rollouts[self.num_known :])


Pairs = Sequence[tuple[Prompt, Rollout]]


class Author(Protocol):
    """Somebody whose answers are kept."""

    def ask(self, prompts: Sequence[Prompt]) -> list[Answers]:
        """Verified answers to each prompt, in order; the same prompts in the same company get the same answers."""

    def logps(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """Log-probabilities (nats) of each answer's tokens under who wrote it; None where nobody knows."""

    def nearness(self, pairs: Pairs) -> list[float]:
        """Mean log-probability a token under the learner."""


def forward_logps(
    world: World, pairs: Pairs, *, temperature: float | None = None, policy: Policy | None = None
) -> list[tuple[float, ...]]:
    """Per-token log-probabilities of responses under the weights at hand, of the world's policy or of another."""
    policy = policy or world.policy
    rows = [TokenRow(prompt_ids=policy.encode(prompt), response_ids=rollout.response_ids) for prompt, rollout in pairs]
    scored = row_scores(policy, world.recipe, rows, temperature=temperature)
    return [tuple(scores.logps_T.tolist()) for scores in scored]


def mean_logps(world: World, pairs: Pairs, *, policy: Policy | None = None) -> list[float]:
    """Mean log-probability a token under the weights at hand."""
    return [sum(logps_T) / len(logps_T) for logps_T in forward_logps(world, pairs, policy=policy)]
