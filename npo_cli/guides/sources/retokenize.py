"""Texts that the learner did not write, told in its own tokens.

What is verified is what these tokens spell: characters that the learner's tokenizer cannot write are lost before anyone
calls the answer right. An answer that does not fit the learner is cut at its limit, and then is as little a guide as
any other that did not end by itself. Log-probabilities are not known: nobody has said these tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from npo_cli.policy.model import Policy
from npo_cli.session.session import Session, mark_truncated_wrong
from npo_cli.types.rollouts import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResponse:
    """One answer as text."""

    prompt: Prompt
    slot: int
    text: str
    finished: bool


@dataclass(kw_only=True, slots=True)
class Retokenizer:
    """From others' texts to verified rollouts."""

    session: Session
    """Whose task verifies."""
    learner: Policy
    num_too_long: int = 0
    """Finished answers that were cut because the learner has no room for them."""

    def retokenize(self, said: Sequence[TextResponse]) -> list[Rollout]:
        """One a text, in order."""
        return grade_rollouts(self.session, [each.prompt for each in said], [self._told(each) for each in said])

    def _told(self, said: TextResponse) -> Rollout:
        body = self.learner.encode_response(said.text)
        # Who falls silent at once has ended, whatever it says of itself.
        finished = said.finished or not body
        ids = (*body, self.learner.end_id) if finished else body
        room = self.max_response_tokens(said.prompt)
        if len(ids) > room:
            self.num_too_long += finished
            ids, finished = ids[:room], False
        return Rollout(
            prompt_id=said.prompt.prompt_id,
            slot=said.slot,
            response_ids=ids,
            behavior_logps=None,
            text=self.learner.tokenizer.decode(ids[:-1] if finished else ids),
            finished=finished,
            sampler_step=None,
            source="teacher",
        )

    def max_response_tokens(self, prompt: Prompt) -> int:
        """Tokens that the learner may answer with, the end token included."""
        wanted, longest = self.session.recipe.sampling.max_new_tokens, self.learner.max_tokens
        return wanted if longest is None else min(wanted, longest - len(self.learner.encode(prompt)))

    def warnings(self) -> list[str]:
        """What was lost, where anything was."""
        if not self.num_too_long:
            return []
        limit = self.session.recipe.sampling.max_new_tokens
        return [
            f"{self.num_too_long} answers heard now have more tokens than the learner may answer with "
            f"(sampling.max_new_tokens={limit}): they count as cut off"
        ]


def grade_rollouts(session: Session, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same with verdict and reward; one that was cut off is never correct."""
    verdicts = session.task.grade(prompts, [rollout.text for rollout in rollouts])
    return [
        replace(rollout, verdict=verdict.verdict, reward=verdict.reward)
        for rollout, verdict in zip(rollouts, mark_truncated_wrong(rollouts, verdicts), strict=True)
    ]
