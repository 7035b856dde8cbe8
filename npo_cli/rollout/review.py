"""A review queue of solved prompts (`order.review`; ReMind, arXiv 2606.03087).

A prompt whose group is all correct enters a first-in, first-out queue with a probability. In every k-th step prompts
from its head take the end of the batch, before sampling: no rollouts are added. All correct again, a prompt leaves
the queue; otherwise it returns to the tail.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import groupby, islice

from npo_cli.config.order import ReviewSettings
from npo_cli.rollout.revisits import RevisitDraw
from npo_cli.seeds import derive_seed
from npo_cli.types.rollouts import Group, GroupOutcome


class ReviewQueue:
    """The solved prompts of a branch that wait for a review.

    `seed`: train.seed. `outcomes`: the groups on record, oldest first. Whether a prompt enters at a step depends on
    seed, step and prompt alone, so a fork starts with the queue of its parent, as its own settings would have it.
    """

    label = "review"

    def __init__(self, settings: ReviewSettings, *, seed: int, outcomes: Iterable[GroupOutcome] = ()) -> None:
        self.settings, self.seed = settings, seed
        self._queue: dict[str, None] = {}
        for step, groups in groupby(outcomes, key=lambda outcome: outcome.step):
            self._add_step(step, ((one.prompt_id, one.num_correct == one.num_rollouts) for one in groups))

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """The queue from head to tail."""
        return tuple(self._queue)

    def count_to_draw(self, step: int, *, num_prompts: int) -> int:
        """Prompts of a step's batch that are to be reviews; 0 where it is not a review step."""
        return self.settings.count_reviews(step, num_prompts=num_prompts)

    def draw(self, count: int, *, group_size: int, seed: int, exclude: Collection[str]) -> RevisitDraw:
        """The first `count` of the queue that are not in `exclude`; they leave it when their groups are added."""
        waiting = (prompt_id for prompt_id in self._queue if prompt_id not in exclude)
        return RevisitDraw(prompt_ids=tuple(islice(waiting, count)))

    def add_groups(self, step: int, on_policy: Sequence[Group], draw: RevisitDraw | None) -> dict[str, float]:
        """The groups of the next step. Its metrics: size of the queue after it, new prompts in it, and in a review step
        how many were reviewed, and of these all correct (graduated) or not (regressed)."""
        groups = [(group.prompt.prompt_id, group.num_correct == len(group.rollouts)) for group in on_policy]
        num_enqueued = self._add_step(step, groups)
        metrics = {"order/queue_size": float(len(self._queue)), "order/enqueued": float(num_enqueued)}
        if draw is not None:
            graduated = sum(is_solved for prompt_id, is_solved in groups if prompt_id in draw.prompt_ids)
            reviewed = len(draw.prompt_ids)
            metrics |= {
                "order/reviewed": float(reviewed),
                "order/graduated": float(graduated),
                "order/regressed": float(reviewed - graduated),
            }
        return metrics

    def _add_step(self, step: int, groups: Iterable[tuple[str, bool]]) -> int:
        """Prompt id and whether it was all correct, of each group of a step; returns the number of new prompts.

        A queued prompt that comes up in the data order counts as reviewed.
        """
        is_solved: dict[str, bool] = {}
        for prompt_id, all_correct in groups:
            is_solved[prompt_id] = all_correct and is_solved.get(prompt_id, True)
        queued = [prompt_id for prompt_id in is_solved if prompt_id in self._queue]
        for prompt_id in queued:
            del self._queue[prompt_id]
        regressed = [prompt_id for prompt_id in queued if not is_solved[prompt_id]]
        new = [one for one, solved in is_solved.items() if solved and one not in queued and self._enters(step, one)]
        self._queue |= dict.fromkeys(regressed + new)
        for prompt_id in list(islice(self._queue, max(0, len(self._queue) - self.settings.max_size))):
            del self._queue[prompt_id]
        return len(new)

    def _enters(self, step: int, prompt_id: str) -> bool:
        share = derive_seed(self.seed, self.label, step, prompt_id) / 2**63
        return share < self.settings.enqueue_probability

    def describe(self) -> str:
        """One line: fraction, schedule and what enters the queue."""
        settings = self.settings
        return (
            f"order: {settings.fraction:.0%} of a batch reviews solved prompts, every {settings.every} steps from step "
            f"{settings.first_step} on; {settings.enqueue_probability:.0%} of all-correct prompts are queued"
        )
