"""What the policy failed, when, and which of it to ask again.

Knows verdicts and ids, no samples' text and no file. Axes: J strata of age (nearest first).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from npo_cli.seeds import derive_seed
from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.rollouts import Group

MIN_PROMPTS_PER_STRATUM = 4
"""Prompts asked of every stratum, however small its share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """Distinct prompts whose newest failure, s, has an age of nearest <= t - s < farthest."""

    min_age: int
    """Steps."""
    max_age: int
    """Steps: the smallest rollback that undoes all of these failures."""
    prompt_ids: tuple[str, ...]
    """Newest failure first."""


def collect_failed_prompts(
    groups: Sequence[Group], *, step: int, epochs: Sequence[int], limit: float
) -> tuple[FailedPrompt, ...]:
    """Prompts of which at most `limit` of the policy's own rollouts were correct; a seated guide is not counted."""
    return tuple(
        FailedPrompt(prompt_id=group.prompt.prompt_id, step=step, accuracy=accuracy, epoch=epoch)
        for group, epoch in zip(groups, epochs, strict=True)
        for accuracy in [group.on_policy.accuracy]
        if accuracy <= limit
    )


def update_failed_prompt_pool(
    before: Sequence[FailedPrompt], new: Sequence[FailedPrompt], *, size: int
) -> tuple[FailedPrompt, ...]:
    """The newest `size` mistakes, oldest first; of one step those that came last."""
    return tuple(sorted((*before, *new), key=lambda mistake: mistake.step)[-size:])


def stratify_failed_prompts(
    mistakes: Sequence[FailedPrompt], *, step: int, distances: Sequence[int], tau: float
) -> tuple[Stratum, ...]:
    """Mistakes of accuracy <= tau by age at `step`, one stratum a distance, ascending; one without any is empty.

    The newest failure of a prompt decides its age. Failures of later steps, or older than every distance, are left out.
    """
    newest: dict[str, int] = {}
    for mistake in mistakes:
        if mistake.accuracy <= tau and mistake.step <= step:
            newest[mistake.prompt_id] = max(mistake.step, newest.get(mistake.prompt_id, mistake.step))
    ordered = sorted(newest.items(), key=lambda failed: -failed[1])
    return tuple(
        Stratum(
            min_age=nearest,
            max_age=farthest,
            prompt_ids=tuple(prompt_id for prompt_id, failed_at in ordered if nearest <= step - failed_at < farthest),
        )
        for nearest, farthest in pairwise([0, *sorted(set(distances))])
    )


def allocate_probe_prompts(strata: Sequence[Stratum], *, num_prompts: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """`num_prompts` of all strata, by size N_j, a few of every stratum; all of them where all fit.

    Not by N_j sqrt(q_j (1 - q_j)) with q_j of a first look (Neyman 1934): the strata that were unlucky in it are asked
    less and stay low, which pulled Q down by up to a tenth (AUTONPO.md).
    """
    sizes_J = [len(stratum.prompt_ids) for stratum in strata]
    counts_J = _allotted(num_prompts, sizes_J, room_J=sizes_J, least=MIN_PROMPTS_PER_STRATUM)
    return tuple(_drawn(stratum.prompt_ids, seed)[:count] for stratum, count in zip(strata, counts_J, strict=True))


def _drawn(prompt_ids: Sequence[str], seed: int) -> tuple[str, ...]:
    """The prompts in a random order that depends on nothing but seed and ids."""
    return tuple(sorted(prompt_ids, key=lambda prompt_id: derive_seed(seed, prompt_id)))


def _allotted(budget: int, weights_J: Sequence[float], *, room_J: Sequence[int], least: int) -> list[int]:
    """How many prompts each stratum gets, one by one: to the largest w_j/(n_j + 1/2) (Webster) that has room.

    Strata below `least` come first. Of equals the nearest. Less than `budget` only where all strata are full.
    """
    counts_J = [0] * len(room_J)
    for _ in range(min(budget, sum(room_J))):
        open_J = [j for j, room in enumerate(room_J) if counts_J[j] < room]
        chosen = max(open_J, key=lambda j: (counts_J[j] < least, weights_J[j] / (counts_J[j] + 0.5)))
        counts_J[chosen] += 1
    return counts_J
