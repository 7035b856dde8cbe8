"""Work cut into a share for each process, and answers put back in order."""

from hypothesis import given
from hypothesis import strategies as some

from npo_cli.session.partition import partition_by_tokens, partition_contiguous, restore_order


def test_the_longest_row_goes_first_and_each_to_who_has_least():
    # 9 to the first; 5, then 4 to the second (0 < 9, 5 < 9); 2 to either at 9: the first; 1 to the second at 9.
    assert partition_by_tokens([2, 9, 4, 1, 5], 2) == [[0, 1], [2, 3, 4]]


def test_fewer_rows_than_processes_leave_some_without():
    assert partition_by_tokens([3], 3) == [[0], [], []]
    assert partition_by_tokens([], 2) == [[], []]


def test_neighbours_stay_together_and_shares_differ_by_one_at_most():
    assert partition_contiguous([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert partition_contiguous([1], 2) == [[], [1]]


@given(some.lists(some.integers(0, 50), max_size=20), some.integers(1, 5))
def test_dealt_out_and_put_back_is_what_it_was(sizes, num_shares):
    shares = partition_by_tokens(sizes, num_shares)
    assert restore_order(shares, [[sizes[place] for place in share] for share in shares]) == sizes
    # No share is above the lightest by more than one row, the greedy rule's promise.
    loads = [sum(sizes[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
