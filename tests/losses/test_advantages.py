import pytest
import torch
from torch import tensor

from npo_cli.losses.advantages import overlong_penalty
from tests.losses.builders import plain_advantages


def test_one_solver_in_eight_is_lifted_far_above_the_rest():
    # mean 1/8; sample std sqrt((0.875^2 + 7 * 0.125^2) / 7) = 0.353553; 0.875 / 0.353553, -0.125 / 0.353553
    expected = [2.474874] + [-0.353553] * 7
    assert plain_advantages(tensor([[1.0] + [0.0] * 7]))[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_five_solvers_in_eight_make_failure_the_rare_event():
    # mean 0.625; sample std sqrt((5 * 0.375^2 + 3 * 0.625^2) / 7) = 0.517549
    expected = [0.724569] * 5 + [-1.207615] * 3
    assert plain_advantages(tensor([[1.0] * 5 + [0.0] * 3]))[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_without_std_only_the_mean_is_taken_off():
    rewards_PG = tensor([[1.0] + [0.0] * 7])
    assert plain_advantages(rewards_PG, divide_by_std=False)[0].tolist() == [0.875] + [-0.125] * 7


def test_eps_is_added_to_the_std():
    # mean 0.5, std sqrt(0.5) = 0.707107; 0.5 / (0.707107 + 0.292893) = 0.5
    assert plain_advantages(tensor([[1.0, 0.0]]), eps=0.292893)[0].tolist() == pytest.approx([0.5, -0.5], abs=1e-6)


def test_each_group_is_judged_by_itself():
    rewards_PG = tensor([[1, 0], [1, 1]])
    # 0.5 / 0.707107 = 0.707107; the unanimous group has nothing to teach
    assert plain_advantages(rewards_PG)[0].tolist() == pytest.approx([0.707107, -0.707107], abs=1e-5)
    assert plain_advantages(rewards_PG)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_a_unanimous_group_gives_exact_zeros_in_spite_of_rounding(divide_by_std):
    # the float32 mean of seven 0.1 is not 0.1, nor is 0.1 + 0.2 equal to 0.3
    rewards_PG = torch.stack([torch.full((7,), 0.1), tensor([0.3, 0.1 + 0.2, 0.3, 0.1 * 3, 0.3, 0.3, 0.3])])
    rewards_PG[1, 1] = torch.nextafter(rewards_PG[1, 1], tensor(1.0))
    assert plain_advantages(rewards_PG, divide_by_std=divide_by_std).tolist() == [[0.0] * 7] * 2


def test_a_small_real_difference_is_not_rounding():
    # an overlong penalty of 1e-4: std = 1e-4 / sqrt(2) = 7.07e-5, 5e-5 / (7.07e-5 + 1e-6) = 0.697
    assert plain_advantages(tensor([[1.0, 0.9999]]))[0].tolist() == pytest.approx([0.697, -0.697], abs=1e-3)


def test_a_group_of_one_has_nothing_to_compare_with():
    assert plain_advantages(tensor([[1.0]])).tolist() == [[0.0]]


def test_overlong_penalty_grows_over_the_buffer_and_stops_at_the_limit():
    # limit 100, buffer 20: free up to 80, then (T - 80) / 20 of the penalty 2, no more beyond 100
    lengths_N = tensor([10, 80, 85, 90, 100, 130])
    found_N = overlong_penalty(lengths_N, max_tokens=100, buffer=20, penalty=2.0)
    assert found_N.tolist() == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]


def test_no_buffer_means_no_overlong_penalty():
    assert overlong_penalty(tensor([1, 100]), max_tokens=100, buffer=0, penalty=1.0).tolist() == [0.0, 0.0]
