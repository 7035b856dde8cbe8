"""Re-tokenize external responses with the learner's tokenizer, and verify them.

The verifier reads the text that the learner's tokens decode to, so characters that its tokenizer cannot represent are
lost before the response is judged. A response longer than the learner's limit is truncated, and thus never correct; a
text too long for that limit is cut before it is tokenized, which for megabytes would take minutes.
The resulting tokens have no behavior log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from npo_cli.policy.model import Policy
from npo_cli.session.session import Session
from npo_cli.types.rollouts import Prompt, Rollout

MIN_CUT_CHARACTERS = 100_000
"""Shorter texts are never cut: a tokenizer may drop characters or join many into one unknown token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResponse:
    """One response as text."""

    prompt: Prompt
    slot: int
    text: str
    finished: bool


@dataclass(kw_only=True)
class Retokenizer:
    """From text to verified rollouts in the learner's tokens."""

    session: Session
    """Its task verifies."""
    learner: Policy
    num_too_long: int = 0
    """Finished responses that were truncated to the learner's limit."""

    def retokenize(self, responses: Sequence[TextResponse]) -> list[Rollout]:
        """One rollout per text, in order."""
        rollouts = [self._to_rollout(response) for response in responses]
        return grade_rollouts(self.session, [response.prompt for response in responses], rollouts)

    def _to_rollout(self, response: TextResponse) -> Rollout:
        limit = self.max_response_tokens(response.prompt)
        # The end of the cut text may have other tokens; they lie beyond the limit.
        text = response.text[: max((limit + 2) * self.max_token_length, MIN_CUT_CHARACTERS)]
        is_cut = len(text) < len(response.text)
        body = self.learner.encode_response(text)
        # An empty response has ended, even if its sampler reports otherwise.
        finished = response.finished or not body
        ids = (*body, self.learner.end_id) if finished and not is_cut else body
        if len(ids) > limit or is_cut:
            self.num_too_long += finished
            ids, finished = ids[:limit], False
        return Rollout(
            prompt_id=response.prompt.prompt_id,
            slot=response.slot,
            response_ids=ids,
            behavior_logps=None,
            text=self.learner.tokenizer.decode(ids[:-1] if finished else ids),
            finished=finished,
            sampler_step=None,
            source="teacher",
        )

    @cached_property
    def max_token_length(self) -> int:
        """Characters of the tokenizer's longest token."""
        return max(map(len, self.learner.tokenizer.get_vocab()))

    def max_response_tokens(self, prompt: Prompt) -> int:
        """Largest number of response tokens of the learner, the end token included."""
        limit, context = self.session.recipe.sampling.max_new_tokens, self.learner.max_tokens
        return limit if context is None else min(limit, context - len(self.learner.encode(prompt)))

    def warnings(self) -> list[str]:
        """How many responses were truncated, if any."""
        if not self.num_too_long:
            return []
        limit = self.session.recipe.sampling.max_new_tokens
        return [f"{self.num_too_long} responses exceed sampling.max_new_tokens={limit} and were truncated"]


def grade_rollouts(session: Session, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with verdict and reward; a truncated one is never correct."""
    texts, finished = [rollout.text for rollout in rollouts], [rollout.finished for rollout in rollouts]
    results = session.task.grade(prompts, texts, finished=finished)
    return [
        replace(rollout, verdict=result.verdict, reward=result.reward, reward_parts=result.parts)
        for rollout, result in zip(rollouts, results, strict=True)
    ]
