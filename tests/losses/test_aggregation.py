import math

import pytest
from torch import tensor

from npo_cli.losses.policy_loss import aggregate
from npo_cli.losses.types import Divisors

LOSS = tensor([[1.0, 2.0, 3.0], [4.0, 100.0, math.nan]])
MASK = tensor([[1, 1, 1], [1, 0, 0]])
WHOLE = Divisors(num_sequences=2, num_tokens=4, max_tokens=10)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("seq_mean_token_mean", (6 / 3 + 4 / 1) / 2),
        ("token_mean", (6 + 4) / 4),
        ("seq_mean_token_sum_norm", (6 + 4) / 10 / 2),
    ],
)
def test_three_ways_to_add_up_tokens(how, expected):
    assert aggregate(LOSS, MASK, how=how, divisors=WHOLE).item() == pytest.approx(expected)


@pytest.mark.parametrize("how", ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"])
def test_a_row_without_tokens_adds_nothing(how):
    empty = tensor([[0, 0, 0], [0, 0, 0]])
    assert aggregate(LOSS, empty, how=how, divisors=WHOLE).item() == 0.0
    nothing = Divisors(num_sequences=2, num_tokens=0, max_tokens=10)
    assert aggregate(LOSS, empty, how=how, divisors=nothing).item() == 0.0
