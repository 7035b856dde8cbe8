"""Rows dealt out to ranks by their number of tokens, and results put back in order."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def partition_by_tokens(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of the rows in each part: the longest row first, each to the part with the fewest tokens so far.

    Within a part the order is kept. Fewer rows than parts leave some empty.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        lightest = loads.index(min(loads))
        parts[lightest].append(index)
        loads[lightest] += sizes[index]
    return [sorted(part) for part in parts]


def restore_order(parts: Sequence[Sequence[int]], results: Sequence[Sequence[Item]]) -> list[Item]:
    """Results of all parts, by the index of their rows."""
    pairs = [pair for part, some in zip(parts, results, strict=True) for pair in zip(part, some, strict=True)]
    return [result for _, result in sorted(pairs, key=lambda pair: pair[0])]
