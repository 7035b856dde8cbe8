"""The pool of failed prompts, its strata by age, and which prompts a probe samples again.

Pure: verdicts and ids, no texts and no files. Axes: J strata of age, youngest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from npo_cli.seeds import derive_seed
from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.rollouts import Group

MIN_PROMPTS_PER_STRATUM = 4
"""Minimum number of prompts probed per stratum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """Distinct prompts whose newest failure, at step s, has an age of min_age <= t - s < max_age."""

    min_age: int
    """Steps."""
    max_age: int
    """Steps: the smallest rollback that replays all of these failures."""
    prompt_ids: tuple[str, ...]
    """Newest failure first."""


def collect_failed_prompts(
    groups: Sequence[Group], *, step: int, epochs: Sequence[int], limit: float
) -> tuple[FailedPrompt, ...]:
    """Prompts of which at most `limit` of the on-policy rollouts were correct; injected rollouts do not count."""
    return tuple(
        FailedPrompt(prompt_id=group.prompt.prompt_id, step=step, accuracy=accuracy, epoch=epoch)
        for group, epoch in zip(groups, epochs, strict=True)
        for accuracy in [group.on_policy.accuracy]
        if accuracy <= limit
    )


def update_failed_prompt_pool(
    before: Sequence[FailedPrompt], new: Sequence[FailedPrompt], *, size: int
) -> tuple[FailedPrompt, ...]:
    """The newest `size` failures, oldest first; within one step the last ones are kept."""
    return tuple(sorted((*before, *new), key=lambda failure: failure.step)[-size:])


def stratify_failed_prompts(
    pool: Sequence[FailedPrompt], *, step: int, distances: Sequence[int], max_accuracy: float
) -> tuple[Stratum, ...]:
    """Failures with accuracy <= max_accuracy by age at `step`, one stratum per distance, ascending, possibly empty.

    A prompt has the age of its newest failure. Failures after `step`, or older than every distance, are left out.
    """
    newest: dict[str, int] = {}
    for failure in pool:
        if failure.accuracy <= max_accuracy and failure.step <= step:
            newest[failure.prompt_id] = max(failure.step, newest.get(failure.prompt_id, failure.step))
    ordered = sorted(newest.items(), key=lambda item: -item[1])
    return tuple(
        Stratum(
            min_age=min_age,
            max_age=max_age,
            prompt_ids=tuple(prompt_id for prompt_id, failed_at in ordered if min_age <= step - failed_at < max_age),
        )
        for min_age, max_age in pairwise([0, *sorted(set(distances))])
    )


def allocate_probe_prompts(strata: Sequence[Stratum], *, num_prompts: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """`num_prompts` of all strata in proportion to their size N_j, a few of every stratum; all of them if they fit.

    Not by N_j sqrt(q_j (1 - q_j)) with q_j of a first half (Neyman 1934): strata that were unlucky in it would get
    fewer samples and stay low, which biased Q by up to a tenth (`docs/explanation/autonpo.md`, Probe).
    """
    sizes_J = [len(stratum.prompt_ids) for stratum in strata]
    counts_J = _allot(num_prompts, sizes_J, room_J=sizes_J, least=MIN_PROMPTS_PER_STRATUM)
    return tuple(_shuffle(stratum.prompt_ids, seed)[:count] for stratum, count in zip(strata, counts_J, strict=True))


def _shuffle(prompt_ids: Sequence[str], seed: int) -> tuple[str, ...]:
    """A random order that depends on the seed and the ids alone."""
    return tuple(sorted(prompt_ids, key=lambda prompt_id: derive_seed(seed, prompt_id)))


def _allot(budget: int, weights_J: Sequence[float], *, room_J: Sequence[int], least: int) -> list[int]:
    """Prompts per stratum, given out one by one to the stratum with room and the largest w_j/(n_j + 1/2) (Webster).

    Strata below `least` come first; ties go to the youngest. Less than `budget` only if all strata are full.
    """
    counts_J = [0] * len(room_J)
    for _ in range(min(budget, sum(room_J))):
        open_J = [j for j, room in enumerate(room_J) if counts_J[j] < room]
        chosen = max(open_J, key=lambda j: (counts_J[j] < least, weights_J[j] / (counts_J[j] + 0.5)))
        counts_J[chosen] += 1
    return counts_J
