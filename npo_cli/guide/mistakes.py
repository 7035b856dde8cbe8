"""What the policy failed, when, and which of it to ask again.

Knows verdicts and ids, no samples' text and no file. Axes: J strata of age (nearest first).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from npo_cli.auto_records import Mistake
from npo_cli.guide.evidence import PromptOutcome
from npo_cli.guide.mix import own_rollouts
from npo_cli.records import Group
from npo_cli.seeds import derive_seed

FEW = 4
"""Prompts that the first half asks of every stratum, however small its share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """Distinct prompts whose newest failure, s, has an age of nearest <= t - s < farthest."""

    nearest: int
    """Steps."""
    farthest: int
    """Steps: the smallest rollback that undoes all of these failures."""
    prompt_ids: tuple[str, ...]
    """Newest failure first."""


def mistakes_of(groups: Sequence[Group], *, step: int, epochs: Sequence[int], limit: float) -> tuple[Mistake, ...]:
    """Prompts of which at most `limit` of the policy's own rollouts were correct; a seated guide is not counted."""
    return tuple(
        Mistake(prompt_id=group.prompt.prompt_id, step=step, accuracy=accuracy, epoch=epoch)
        for group, epoch in zip(groups, epochs, strict=True)
        for accuracy in [_own_accuracy(group)]
        if accuracy <= limit
    )


def remembered(before: Sequence[Mistake], new: Sequence[Mistake], *, size: int) -> tuple[Mistake, ...]:
    """The newest `size` mistakes, oldest first; of one step those that came last."""
    return tuple(sorted((*before, *new), key=lambda mistake: mistake.step)[-size:])


def strata_of(mistakes: Sequence[Mistake], *, step: int, distances: Sequence[int], tau: float) -> tuple[Stratum, ...]:
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
            nearest=nearest,
            farthest=farthest,
            prompt_ids=tuple(prompt_id for prompt_id, failed_at in ordered if nearest <= step - failed_at < farthest),
        )
        for nearest, farthest in pairwise([0, *sorted(set(distances))])
    )


def first_half(strata: Sequence[Stratum], *, num_prompts: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Prompts of each stratum to ask first: half of `num_prompts`, by size N_j, a few of every stratum.

    All of them where all fit into `num_prompts`, since then there is nothing to choose.
    """
    sizes_J = [len(stratum.prompt_ids) for stratum in strata]
    budget = num_prompts if sum(sizes_J) <= num_prompts else math.ceil(num_prompts / 2)
    counts_J = _allotted(budget, sizes_J, room_J=sizes_J, least=FEW)
    return tuple(_drawn(stratum.prompt_ids, seed)[:count] for stratum, count in zip(strata, counts_J, strict=True))


def second_half(
    strata: Sequence[Stratum],
    asked: Sequence[Sequence[str]],
    spread: Sequence[float],
    *,
    num_prompts: int,
    seed: int,
) -> tuple[tuple[str, ...], ...]:
    """Prompts to ask on top of `asked`: the rest of `num_prompts`, by N_j spread_j (Neyman 1934), none twice.

    A stratum that runs out passes its share on to the others.
    """
    left_J = [
        [prompt_id for prompt_id in _drawn(stratum.prompt_ids, seed) if prompt_id not in before]
        for stratum, before in zip(strata, map(frozenset, asked), strict=True)
    ]
    weights_J = [len(stratum.prompt_ids) * each for stratum, each in zip(strata, spread, strict=True)]
    budget = max(0, num_prompts - sum(map(len, asked)))
    counts_J = _allotted(budget, weights_J, room_J=[len(left) for left in left_J], least=0)
    return tuple(tuple(left[:count]) for left, count in zip(left_J, counts_J, strict=True))


def spreads_of(strata: Sequence[Stratum], outcomes: Sequence[PromptOutcome]) -> tuple[float, ...]:
    """Spread of one sample in each stratum, sqrt(q (1 - q)) with q = (c + 1/2)/(n + 1); 1/2 where nothing was asked."""
    by_id = {outcome.prompt_id: outcome for outcome in outcomes}
    spreads = []
    for stratum in strata:
        found = [by_id[prompt_id] for prompt_id in stratum.prompt_ids if prompt_id in by_id]
        num_samples = sum(outcome.num_samples for outcome in found)
        quality = (sum(outcome.num_correct for outcome in found) + 0.5) / (num_samples + 1.0)
        spreads.append(math.sqrt(quality * (1.0 - quality)))
    return tuple(spreads)


def _own_accuracy(group: Group) -> float:
    own = own_rollouts(group)
    assert own and all(rollout.verdict is not None for rollout in own), "groups are verified before they are judged"
    return sum(rollout.verdict == "correct" for rollout in own) / len(own)


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
