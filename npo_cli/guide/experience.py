"""ExGRPO's memory of past successes: what enters it, what leaves it, and which prompts are replayed.

Functions from one memory to the next (arXiv 2510.02245; algorithms, section 6). It scores nothing: which of a prompt's
answers is replayed depends on the present policy, and is the stage's to ask.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from npo_cli.guide_records import ReplayBuffer, Success


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupResult:
    """One group of the batch, all slots counted, the replayed one included."""

    prompt_id: str
    num_correct: int
    group_size: int
    epoch: int
    new_successes: tuple[Success, ...]
    """The policy's own correct responses of this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """How prompts are preferred by the number of correct rollouts in their newest group."""

    group_size: int
    units: Literal["count", "rate"]
    sigma: float


def start_collecting(memory: ReplayBuffer, success_rate: float, *, start: float) -> ReplayBuffer:
    """Collection begins after the first batch with a success rate above `start`, and never ends."""
    return replace(memory, started=memory.is_collecting or success_rate > start)


def add_successes(memory: ReplayBuffer, outcomes: Sequence[GroupResult], *, retire: bool) -> ReplayBuffer:
    """Partly solved groups leave their correct responses, each text once; a wholly solved prompt leaves the memory."""
    if not memory.is_collecting:
        return memory
    successes, num_correct, retired = dict(memory.successes), dict(memory.num_correct), dict(memory.retired_epochs)
    for outcome in outcomes:
        if outcome.num_correct == outcome.group_size and retire:
            successes.pop(outcome.prompt_id, None)
            num_correct.pop(outcome.prompt_id, None)
            retired.setdefault(outcome.prompt_id, outcome.epoch)
        elif 0 < outcome.num_correct < outcome.group_size:
            known = {success.text: success for success in (*successes.get(outcome.prompt_id, ()),)}
            for success in outcome.new_successes:
                known.setdefault(success.text, success)
            successes[outcome.prompt_id] = tuple(known.values())
            num_correct[outcome.prompt_id] = outcome.num_correct
    return replace(memory, successes=successes, num_correct=num_correct, retired=retired)


def bucket_probabilities(counts: Collection[int], buckets: Buckets) -> dict[int, float]:
    """Probability of each non-empty bucket k: N(k; n/2, sigma) in counts, or N(k/n; 1/2, sigma) in rates, normalised.

    A bucket has one mass however many prompts lie in it. In counts with sigma = 1 and n = 8 the weights are 1, .607,
    .135 and .011 at |k - 4| = 0 to 3; in rates they are almost flat (the code and the text of the paper differ).
    """
    scale = 1.0 if buckets.units == "count" else 1.0 / buckets.group_size
    distance = {count: (count - buckets.group_size / 2) * scale / buckets.sigma for count in sorted(set(counts))}
    weights = {count: math.exp(-(away**2) / 2) for count, away in distance.items()}
    total = sum(weights.values())
    return {count: weight / total for count, weight in weights.items()}


def sample_replay_prompts(
    memory: ReplayBuffer, num_prompts: int, *, buckets: Buckets, seed: int, exclude: Collection[str] = ()
) -> list[str]:
    """Prompts to be replayed: bucket by bucket at random, uniform inside and without replacement.

    What an emptied bucket cannot give is drawn from the others. Fewer come where the memory holds fewer.
    """
    rng = random.Random(seed)
    waiting: dict[int, list[str]] = {}
    for prompt_id in sorted(memory.successes.keys() - set(exclude)):
        waiting.setdefault(memory.num_correct[prompt_id], []).append(prompt_id)
    for prompts in waiting.values():
        rng.shuffle(prompts)
    chosen: list[str] = []
    while waiting and len(chosen) < num_prompts:
        shares = bucket_probabilities(waiting.keys(), buckets)
        # Python's own choices, so that a seed means the same wherever numpy is newer.
        picks = rng.choices(list(shares), weights=list(shares.values()), k=num_prompts - len(chosen))
        for bucket in picks:
            if waiting.get(bucket):
                chosen.append(waiting[bucket].pop())
        waiting = {bucket: prompts for bucket, prompts in waiting.items() if prompts}
    return chosen


def buffer_metrics(memory: ReplayBuffer) -> Mapping[str, float]:
    """What the memory holds, as metrics."""
    return {
        "experience/prompts": float(len(memory.successes)),
        "experience/answers": float(sum(map(len, memory.successes.values()))),
        "experience/retired": float(len(memory.retired_epochs)),
    }
