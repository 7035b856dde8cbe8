"""Rows dealt out to ranks, and results put back in order."""

from hypothesis import given
from hypothesis import strategies as some

from npo_cli.distributed.partition import partition_by_tokens, restore_order


def test_partition_by_tokens_gives_the_longest_row_first_to_the_lightest_part():
    # 9 to the first; 5, then 4 to the second (0 < 9, 5 < 9); 2 to either at 9: the first; 1 to the second at 9.
    assert partition_by_tokens([2, 9, 4, 1, 5], 2) == [[0, 1], [2, 3, 4]]


def test_partition_by_tokens_leaves_parts_empty_with_fewer_rows():
    assert partition_by_tokens([3], 3) == [[0], [], []]
    assert partition_by_tokens([], 2) == [[], []]


@given(some.lists(some.integers(0, 50), max_size=20), some.integers(1, 5))
def test_restore_order_reverses_partition_by_tokens(sizes, num_parts):
    parts = partition_by_tokens(sizes, num_parts)
    assert restore_order(parts, [[sizes[place] for place in share] for share in parts]) == sizes
    # No part is above the lightest by more than one row, the greedy rule's promise.
    loads = [sum(sizes[place] for place in share) for share in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0)
