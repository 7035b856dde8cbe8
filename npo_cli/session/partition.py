"""What each of several processes holds, and how work is cut into a share for each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from npo_cli.distributed.process_group import Worker
from npo_cli.policy.model import Policy

Item = TypeVar("Thing")


@dataclass(kw_only=True)
class WorkerState(Worker):
    """One process, with what stages make of its shards."""

    policies: dict[str, Policy] = field(default_factory=dict)
    updater: Any = None
    """Of stages/update.py, which knows this file."""


def partition_by_tokens(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Places of the items in each share: the longest first, each to the share with the fewest tokens so far.

    Within a share the order is kept. Fewer items than shares leave some empty.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        lightest = loads.index(min(loads))
        shares[lightest].append(place)
        loads[lightest] += sizes[place]
    return [sorted(share) for share in shares]


def partition_contiguous(items: Sequence[Item], num_shares: int) -> list[Sequence[Item]]:
    """Neighbours stay together: the first share, the second, ..., equal to within one item."""
    edges = [len(items) * share // num_shares for share in range(num_shares + 1)]
    return [items[start:end] for start, end in pairwise(edges)]


def restore_order(shares: Sequence[Sequence[int]], answers: Sequence[Sequence[Item]]) -> list[Item]:
    """Answers of all shares, put back to where their questions stood."""
    pairs = [pair for share, some in zip(shares, answers, strict=True) for pair in zip(share, some, strict=True)]
    return [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]
