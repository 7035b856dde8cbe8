"""A loaded task: prompts and verifier; and the order in which training visits the prompts.

The order is a pure function of (seed, position), so there is no iterator state to save: a rollback uses an earlier
position again.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.tasks.base import Verifier
from npo_cli.types.rollouts import Prompt, VerifierResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Training prompts, held-out prompts, and the verifier."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    verifier: Verifier
    _by_id: Mapping[str, Prompt] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id = {prompt.prompt_id: prompt for prompt in (*self.train, *self.heldout)}
        assert len(by_id) == len(self.train) + len(self.heldout), "prompt ids must be unique in a task"
        object.__setattr__(self, "_by_id", by_id)

    def prompt(self, prompt_id: str) -> Prompt:
        """The training or held-out prompt with this id."""
        if prompt_id not in self._by_id:
            raise NpoError(
                f"the task has no prompt {prompt_id}",
                "use the task settings (task.* and the seed) with which the id was made",
            )
        return self._by_id[prompt_id]

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        """The verdict for each response; response i answers prompt i. Several ranks share the work."""

        def grade_part(pairs: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
            return self.verifier.grade([prompt for prompt, _ in pairs], [response for _, response in pairs])

        return current_group().map(grade_part, list(zip(prompts, responses, strict=True)), phase="verify")

    def close(self) -> None:
        """End the verifier's processes. Grading again starts new ones."""
        self.verifier.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """Epochs, each a permutation of the pool seeded by (seed, epoch).

    A position counts the prompts visited since the start of the run, so a batch may span two epochs:
    indices(p, a + b) = indices(p, a) + indices(p + a, b).
    """

    num_prompts: int
    seed: int

    def epoch(self, position: int) -> int:
        """Number of complete passes over the pool before `position`."""
        return position // self.num_prompts

    def indices(self, position: int, count: int) -> tuple[int, ...]:
        """Indices into the pool of the `count` prompts from `position` on."""
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(position + len(found), self.num_prompts)
            order = _permutation(self.num_prompts, seed=self.seed, epoch=epoch)
            found.extend(order[offset : offset + count - len(found)])
        return tuple(found)


@lru_cache(maxsize=4)
def _permutation(num_prompts: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of one epoch, cached for the steps of that epoch."""
    order = list(range(num_prompts))
    random.Random(f"order:{seed}:{epoch}").shuffle(order)
    return tuple(order)
