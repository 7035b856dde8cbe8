import pytest
import torch
from torch import tensor

from npo_cli.losses.advantages import overlong_penalty
from tests.losses.builders import plain_advantages


def test_advantage_of_one_correct_in_eight():
    # mean 1/8; sample std sqrt((0.875^2 + 7 * 0.125^2) / 7) = 0.353553; 0.875 / 0.353553, -0.125 / 0.353553
    expected = [2.474874] + [-0.353553] * 7
    assert plain_advantages(tensor([[1.0] + [0.0] * 7]))[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_advantage_of_five_correct_in_eight():
    # mean 0.625; sample std sqrt((5 * 0.375^2 + 3 * 0.625^2) / 7) = 0.517549
    expected = [0.724569] * 5 + [-1.207615] * 3
    assert plain_advantages(tensor([[1.0] * 5 + [0.0] * 3]))[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_advantage_without_std_subtracts_the_mean():
    rewards_PG = tensor([[1.0] + [0.0] * 7])
    assert plain_advantages(rewards_PG, divide_by_std=False)[0].tolist() == [0.875] + [-0.125] * 7


def test_advantage_eps_is_added_to_the_std():
    # mean 0.5, std sqrt(0.5) = 0.707107; 0.5 / (0.707107 + 0.292893) = 0.5
    assert plain_advantages(tensor([[1.0, 0.0]]), eps=0.292893)[0].tolist() == pytest.approx([0.5, -0.5], abs=1e-6)


def test_advantage_groups_are_independent():
    rewards_PG = tensor([[1, 0], [1, 1]])
    # 0.5 / 0.707107 = 0.707107; the unanimous group has nothing to teach
    assert plain_advantages(rewards_PG)[0].tolist() == pytest.approx([0.707107, -0.707107], abs=1e-5)
    assert plain_advantages(rewards_PG)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_advantage_of_equal_rewards_is_exactly_zero(divide_by_std):
    # the float32 mean of seven 0.1 is not 0.1, nor is 0.1 + 0.2 equal to 0.3
    rewards_PG = torch.stack([torch.full((7,), 0.1), tensor([0.3, 0.1 + 0.2, 0.3, 0.1 * 3, 0.3, 0.3, 0.3])])
    rewards_PG[1, 1] = torch.nextafter(rewards_PG[1, 1], tensor(1.0))
    assert plain_advantages(rewards_PG, divide_by_std=divide_by_std).tolist() == [[0.0] * 7] * 2


def test_advantage_of_a_small_difference_is_not_zero():
    # an overlong penalty of 1e-4: std = 1e-4 / sqrt(2) = 7.07e-5, 5e-5 / (7.07e-5 + 1e-6) = 0.697
    assert plain_advantages(tensor([[1.0, 0.9999]]))[0].tolist() == pytest.approx([0.697, -0.697], abs=1e-3)


def test_advantage_of_a_group_of_one_is_zero():
    assert plain_advantages(tensor([[1.0]])).tolist() == [[0.0]]


def test_overlong_penalty_grows_over_the_buffer_and_stops_at_the_limit():
    # limit 100, buffer 20: free up to 80, then (T - 80) / 20 of the penalty 2, no more beyond 100
    lengths_N = tensor([10, 80, 85, 90, 100, 130])
    found_N = overlong_penalty(lengths_N, max_tokens=100, buffer=20, penalty=2.0)
    assert found_N.tolist() == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]


def test_overlong_penalty_without_buffer_is_zero():
    assert overlong_penalty(tensor([1, 100]), max_tokens=100, buffer=0, penalty=1.0).tolist() == [0.0, 0.0]
