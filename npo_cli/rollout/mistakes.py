"""Mistakes first: a share of each batch from prompts that the policy failed when it last saw them (`order.mistakes`).

Per prompt three numbers are kept: its weighted correct and wrong rollouts, and the accuracy of its newest group. They
follow from the rollouts on record, so a resumed branch reads them there, and nothing is added to the training state.
"""

import math
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from npo_cli.config.order import OrderSettings
from npo_cli.rollout.revisits import RevisitDraw
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


class StandingMistakes:
    """The prompts of a branch whose newest group was at or below `threshold`.

    `outcomes`: the groups on record, oldest first. `fork_step`: the step that the branch starts from.
    """

    label = "mistakes"

    def __init__(
        self, settings: OrderSettings, *, threshold: float, fork_step: int, outcomes: Iterable[GroupOutcome]
    ) -> None:
        self.settings, self.threshold, self.fork_step = settings, threshold, fork_step
        self._visits: dict[str, PromptVisits] = {}
        for one in outcomes:
            self._add(one.prompt_id, num_correct=one.num_correct, num_rollouts=one.num_rollouts)

    def add_groups(self, step: int, on_policy: Sequence[Group], draw: RevisitDraw | None) -> dict[str, float]:
        """The groups of the next step. Its metrics: standing mistakes, prompts drawn from them, and how many of their
        groups were forecast to be partly solved, and were; empty outside the window."""
        for group in on_policy:
            self._add(group.prompt.prompt_id, num_correct=group.num_correct, num_rollouts=len(group.rollouts))
        if draw is None or not draw.prompt_ids:
            return {} if draw is None else dict(draw.metrics)
        drawn = [group for group in on_policy if group.prompt.prompt_id in draw.prompt_ids]
        found = sum(0 < group.num_correct < len(group.rollouts) for group in drawn)
        return {**draw.metrics, "order/partly_solved": float(found)}

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

    def compute_chances(self, group_size: int) -> dict[str, float]:
        """Posterior chance of a partly solved group of each standing mistake, sorted by prompt id."""
        standing = sorted(name for name, seen in self._visits.items() if seen.newest_accuracy <= self.threshold)
        return {
            name: compute_partly_solved_chance(seen.num_correct, seen.num_wrong, group_size=group_size)
            for name in standing
            for seen in [self._visits[name]]
        }

    def draw(self, count: int, *, group_size: int, seed: int, exclude: Collection[str]) -> RevisitDraw:
        """At most `count` standing mistakes, none of `exclude`, without replacement, the chance of each proportional to
        that of a partly solved group.

        The largest log(u) / weight are drawn, u uniform per prompt (Efraimidis and Spirakis 2006). Prompts are
        visited by id, so the draw is a function of the seed and the record.
        """
        rng, chances = random.Random(seed), self.compute_chances(group_size)
        keys = {prompt_id: math.log(1 - rng.random()) / chance for prompt_id, chance in chances.items()}
        waiting = [(key, prompt_id) for prompt_id, key in keys.items() if prompt_id not in exclude]
        drawn = tuple(prompt_id for _, prompt_id in sorted(waiting, reverse=True)[:count])
        metrics = {"order/standing": float(len(chances)), "order/mistakes": float(len(drawn))}
        if drawn:
            metrics["order/partly_solved_forecast"] = sum(chances[prompt_id] for prompt_id in drawn)
        return RevisitDraw(prompt_ids=drawn, metrics=metrics)

    def describe(self) -> str:
        """One line: fraction, threshold and window."""
        settings = self.settings
        start = self.fork_step if settings.start_step is None else settings.start_step
        last = "the end" if settings.num_steps is None else str(start + settings.num_steps)
        return (
            f"order: {settings.mistakes:.0%} of each batch from prompts with an accuracy <= {self.threshold:g} when "
            f"last seen, steps {start + 1} to {last}"
        )
