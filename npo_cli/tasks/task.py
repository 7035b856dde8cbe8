"""A task as the stages see it, and the order in which its prompts are visited.

The order is a pure function of (seed, position): rolling back is asking for an earlier position again. There is
no iterator state to save, restore or lose.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.tasks.verifiers import Verifier
from npo_cli.types.rollouts import Prompt, VerifierResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Problems to train on, problems never trained on, and who says what is right."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    verifier: Verifier
    _by_id: Mapping[str, Prompt] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id = {prompt.prompt_id: prompt for prompt in (*self.train, *self.heldout)}
        assert len(by_id) == len(self.train) + len(self.heldout), "prompt ids must be unique in a task"
        object.__setattr__(self, "_by_id", by_id)

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt of that id, trained on or held out."""
        if prompt_id not in self._by_id:
            raise NpoError(
                f"this task has no prompt {prompt_id}",
                "use the task settings (task.* and its seed) that the id was made with",
            )
        return self._by_id[prompt_id]

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        """The verdict on each response, which answers the prompt at the same place. Several ranks share the work."""

        def grade_part(pairs: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
            return self.verifier.grade([prompt for prompt, _ in pairs], [response for _, response in pairs])

        return current_group().map(grade_part, list(zip(prompts, responses, strict=True)), phase="verify")

    def close(self) -> None:
        """End the verifier's processes, if it has any. Grading again starts new ones."""
        self.verifier.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """Epoch after epoch, each a permutation of the pool seeded by (seed, epoch).

    A position counts the prompts consumed since the start of the run, so a batch may straddle two epochs:
    indices(p, a + b) = indices(p, a) + indices(p + a, b).
    """

    num_prompts: int
    seed: int

    def epoch(self, position: int) -> int:
        """Whole passes over the pool finished before `position`."""
        return position // self.num_prompts

    def indices(self, position: int, count: int) -> tuple[int, ...]:
        """Places in the pool of the `count` prompts from `position` on. None are left out, none come early."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(position + len(found), self.num_prompts)
            order = _permutation(self.num_prompts, seed=self.seed, epoch=epoch)
            found.extend(order[place : place + count - len(found)])
        return tuple(found)


@lru_cache(maxsize=4)
def _permutation(num_prompts: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """Remembered only because a step asks for the same epoch as the step before."""
    order = list(range(num_prompts))
    random.Random(f"order:{seed}:{epoch}").shuffle(order)
    return tuple(order)
