"""Mistakes first: a share of each batch from prompts that the policy failed when it last saw them (`order.mistakes`).

Per prompt three numbers are kept: its weighted correct and wrong rollouts, and the accuracy of its newest group. They
follow from the rollouts on record, so a resumed branch reads them there, and nothing is added to the training state.
"""

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from npo_cli.config.order import OrderSettings
from npo_cli.types.rollouts import Group, GroupOutcome


def compute_partly_solved_chance(num_correct: float, num_wrong: float, *, group_size: int) -> float:
    """Posterior chance that a group of n rollouts has correct and wrong ones, which is what gives it a gradient.

    With a uniform prior of the pass rate q, and c correct and w wrong rollouts seen, q ~ Beta(a, b), a = 1 + c and
    b = 1 + w; B is the beta function:

        P(partly solved) = 1 - E[q^n] - E[(1 - q)^n] = 1 - B(a + n, b) / B(a, b) - B(a, b + n) / B(a, b)
        B(a + n, b) / B(a, b) = prod over i < n of (a + i) / (a + b + i)

    Without any rollout it is 1 - 2 / (n + 1).
    """
    a, b = 1 + num_correct, 1 + num_wrong
    all_correct = math.prod((a + i) / (a + b + i) for i in range(group_size))
    all_wrong = math.prod((b + i) / (a + b + i) for i in range(group_size))
    return 1 - all_correct - all_wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptVisits:
    """The groups of one prompt so far. Each counts `order.visit_decay` times as much as the next newer one: the policy
    that sampled it is older."""

    num_correct: float
    """Weighted sum."""
    num_wrong: float
    """Weighted sum."""
    newest_accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MistakeDraw:
    """What one step drew."""

    chances: Mapping[str, float]
    """Posterior chance of a partly solved group, by the id of each prompt drawn."""
    num_standing: int
    """Standing mistakes that there were."""


class StandingMistakes:
    """The prompts of a branch whose newest group was at or below `threshold`.

    `outcomes`: the groups on record, oldest first. `fork_step`: the step that the branch starts from.
    """

    def __init__(
        self, settings: OrderSettings, *, threshold: float, fork_step: int, outcomes: Iterable[GroupOutcome]
    ) -> None:
        self.settings, self.threshold, self.fork_step = settings, threshold, fork_step
        self._visits: dict[str, PromptVisits] = {}
        for one in outcomes:
            self._add(one.prompt_id, num_correct=one.num_correct, num_rollouts=one.num_rollouts)

    def add_groups(self, on_policy: Iterable[Group]) -> None:
        """The groups of the next step, before injection."""
        for group in on_policy:
            self._add(group.prompt.prompt_id, num_correct=group.num_correct, num_rollouts=len(group.rollouts))

    def _add(self, prompt_id: str, *, num_correct: int, num_rollouts: int) -> None:
        before, decay = self._visits.get(prompt_id), self.settings.visit_decay
        self._visits[prompt_id] = PromptVisits(
            num_correct=num_correct + (decay * before.num_correct if before else 0.0),
            num_wrong=num_rollouts - num_correct + (decay * before.num_wrong if before else 0.0),
            newest_accuracy=num_correct / num_rollouts,
        )

    def count_to_draw(self, step: int, *, num_prompts: int) -> int:
        """Prompts of a step's batch that are to be standing mistakes; 0 outside the window."""
        return self.settings.count_mistakes(step, fork_step=self.fork_step, num_prompts=num_prompts)

    def draw(self, count: int, *, group_size: int, seed: int, exclude: Collection[str]) -> MistakeDraw:
        """At most `count` standing mistakes, none of `exclude`, without replacement, the chance of each proportional to
        that of a partly solved group.

        The largest log(u) / weight are drawn, u uniform per prompt (Efraimidis and Spirakis 2006). Prompts are
        visited by id, so the draw is a function of the seed and the record.
        """
        rng = random.Random(seed)
        standing = sorted(name for name, seen in self._visits.items() if seen.newest_accuracy <= self.threshold)
        waiting = []
        for prompt_id in standing:
            seen = self._visits[prompt_id]
            chance = compute_partly_solved_chance(seen.num_correct, seen.num_wrong, group_size=group_size)
            key = math.log(1 - rng.random()) / chance
            if prompt_id not in exclude:
                waiting.append((key, prompt_id, chance))
        drawn = sorted(waiting, reverse=True)[:count]
        return MistakeDraw(chances={prompt_id: chance for _, prompt_id, chance in drawn}, num_standing=len(standing))


def mistake_metrics(draw: MistakeDraw | None, on_policy: Sequence[Group]) -> dict[str, float]:
    """Standing mistakes, prompts drawn from them, and how many of their groups were forecast to be partly solved, and
    were. Empty outside the window."""
    if draw is None:
        return {}
    metrics = {"order/standing": float(draw.num_standing), "order/mistakes": float(len(draw.chances))}
    if draw.chances:
        drawn = [group for group in on_policy if group.prompt.prompt_id in draw.chances]
        metrics["order/partly_solved_forecast"] = sum(draw.chances.values())
        metrics["order/partly_solved"] = float(sum(0 < group.num_correct < len(group.rollouts) for group in drawn))
    return metrics


def describe_order(mistakes: StandingMistakes) -> str:
    """One line: fraction, threshold and window."""
    settings = mistakes.settings
    start = mistakes.fork_step if settings.start_step is None else settings.start_step
    last = "the end" if settings.num_steps is None else str(start + settings.num_steps)
    return (
        f"order: {settings.mistakes:.0%} of each batch from prompts with an accuracy <= {mistakes.threshold:g} when "
        f"last seen, steps {start + 1} to {last}"
    )
