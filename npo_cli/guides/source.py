"""Somebody whose answers are kept: what is asked of an author, and the forward passes that charge answers to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from npo_cli.config.guides import GuideSettings
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.model import Policy
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.session import Session
from npo_cli.types.rollouts import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResponses:
    """What was said to one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    duplicates: tuple[Rollout, ...] = ()
    """Answers that are among `rollouts` already: counted, never kept."""
    num_tokens: int = 0
    """Tokens generated for this cache."""

    @property
    def correct_rollouts(self) -> list[Rollout]:
        """Verified-correct and ended by themselves."""
        return filter_correct(self.rollouts)

    @property
    def num_sampled(self) -> int:
        """Answers heard."""
        return len(self.rollouts) + len(self.duplicates)

    @property
    def num_correct(self) -> int:
        """Correct answers heard."""
        return len(self.correct_rollouts) + len(filter_correct(self.duplicates))


def filter_correct(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those that are verified-correct and ended by themselves."""
    return [rollout for rollout in rollouts if rollout.verdict == "correct" and rollout.finished]


Pairs = Sequence[tuple[Prompt, Rollout]]
PriorRollouts = Mapping[str, Sequence[Rollout]]
"""Answers given before, by prompt id: they count as the first samples, and cost nothing again."""
SampleFunction = Callable[[Sequence[Prompt], range], Sequence[PromptResponses]]
"""New answers to each prompt, one a slot."""


class GuideSource(Protocol):
    """Somebody whose answers are kept."""

    forwards_per_token: int
    """Forward passes that each sampled token takes."""

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Verified answers to each prompt, in order; the same prompts in the same company get the same answers."""

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """Log-probabilities (nats) of each answer's tokens under who wrote it; None where nobody knows."""

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Mean log-probability a token under the learner."""

    def warnings(self) -> list[str]:
        """What a person should know when all is asked."""


def sample_in_rounds(
    settings: GuideSettings,
    prompts: Sequence[Prompt],
    draw: SampleFunction,
    *,
    prior_rollouts: PriorRollouts | None = None,
) -> list[PromptResponses]:
    """Up to `samples_per_prompt` samples per prompt, `samples_per_round` at a time, until a prompt is solved.

    With `draws_all` solved prompts are sampled further.
    """
    asked = {prompt.prompt_id: _begun(prompt, (prior_rollouts or {}).get(prompt.prompt_id, ())) for prompt in prompts}
    while True:
        wanting = [
            entry
            for entry in asked.values()
            if len(entry.rollouts) < settings.cache.samples_per_prompt
            and (settings.cache.draws_all or not entry.correct_rollouts)
        ]
        if not wanting:
            return list(asked.values())
        # Those who have the fewest answers are asked together, so that a slot is never drawn twice.
        first = min(len(entry.rollouts) for entry in wanting)
        slots = range(
            first,
            min(
                first
                + (settings.cache.samples_per_prompt if settings.cache.draws_all else settings.cache.samples_per_round),
                settings.cache.samples_per_prompt,
            ),
        )
        now = [entry.prompt for entry in wanting if len(entry.rollouts) == first]
        for new in draw(now, slots):
            before = asked[new.prompt.prompt_id]
            asked[new.prompt.prompt_id] = replace(
                before, rollouts=before.rollouts + new.rollouts, num_tokens=before.num_tokens + new.num_tokens
            )


def _begun(prompt: Prompt, rollouts: Sequence[Rollout]) -> PromptResponses:
    return PromptResponses(prompt=prompt, rollouts=tuple(rollouts))


def dedupe_rollouts(prompt: Prompt, rollouts: Sequence[Rollout]) -> PromptResponses:
    """Answers that cost nothing; of the same tokens said again the first is kept."""
    first: dict[tuple[int, ...], Rollout] = {}
    repeats = []
    for rollout in rollouts:
        if rollout.response_ids in first:
            repeats.append(rollout)
        else:
            first[rollout.response_ids] = rollout
    return PromptResponses(prompt=prompt, rollouts=tuple(first.values()), duplicates=tuple(repeats))


def compute_logprobs(
    session: Session,
    pairs: Pairs,
    *,
    temperature: float | None = None,
    policy: Policy | ExtrapolatedPolicy | None = None,
) -> list[tuple[float, ...]]:
    """Per-token log-probabilities of responses under the weights at hand, of the world's policy or of another."""
    policy = policy or session.policy
    rows = [policy.row(prompt, rollout.response_ids) for prompt, rollout in pairs]
    scored = run_logprob_pass(policy, session.recipe, rows, temperature=temperature)
    return [tuple(scores.logps_T.tolist()) for scores in scored]


def compute_mean_logprobs(session: Session, pairs: Pairs, *, policy: Policy | None = None) -> list[float]:
    """Mean log-probability a token under the weights at hand."""
    return [sum(logps_T) / len(logps_T) for logps_T in compute_logprobs(session, pairs, policy=policy)]
