"""Each method of the paper's table on one group that is worked out by hand (algorithms, sections 4, 5, 6, 7 and 13).

Eight slots of one token: seven wrong ones of the policy's own, one right one of somebody else, before any update.
The number looked at is the weight on grad log pi of the foreign token, for an advantage of 1 and without the
aggregation's divisor.
"""

import math

import pytest
import torch
from torch import Tensor, tensor

from npo_cli.config.loading import load_recipe
from npo_cli.config.locate import list_method_names
from npo_cli.config.recipe import Recipe
from npo_cli.losses.advantages import group_advantages
from npo_cli.losses.policy_loss import make_policy_loss
from npo_cli.losses.types import Divisors, LossInputs

DIVISORS = Divisors(num_sequences=1, num_tokens=1, max_tokens=1)


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe("micro-sparse", ["loss.entropy_coef=0", "guide.inject.ratio=exact", *overrides], method=name)


def gradient(settings: Recipe, *, policy: float, author: float | None, advantage: float = 1.0) -> float:
    """-dL/dl of a foreign token of probability `policy` under the learner and `author` under who wrote it."""
    logps_NT = tensor([[math.log(policy)]], requires_grad=True)
    known = math.nan if author is None else math.log(author)
    rows = LossInputs(
        behavior_logps_NT=tensor([[known]]),
        mask_NT=tensor([[True]]),
        advantages_N=tensor([advantage]),
        off_policy_NT=tensor([[True]]),
        unclipped_NT=tensor([[not settings.guide.inject.clip_off_policy]]),
    )
    policy_loss = make_policy_loss(settings.loss, settings.guide.inject, settings.mismatch)
    loss, _ = policy_loss(logps_NT, rows, divisors=DIVISORS)
    (found,) = torch.autograd.grad(loss, logps_NT)
    return -found.item()


def advantages(settings: Recipe, rewards: list[float], foreign: int) -> Tensor:
    own_PG = tensor([[True] * (len(rewards) - foreign) + [False] * foreign])
    baseline_PG = own_PG if settings.guide.inject.baseline == "on_policy" else None
    loss = settings.loss
    return group_advantages(
        tensor([rewards]), divide_by_std=loss.divide_by_std, eps=loss.adv_eps, baseline_PG=baseline_PG
    )[0]


@pytest.mark.parametrize("track", ["matched", "reference"])
def test_luffy_charges_a_trace_to_nobody_and_shapes_its_probability(track):
    # gamma p / (p + gamma)^2 with gamma = .1: .0826 at .01, .25 at .1, .1389 at .5, .0826 at 1
    for policy, weight in ((0.01, 0.0826), (0.1, 0.25), (0.5, 0.1389), (1.0, 0.0826)):
        settings = load_recipe("micro-sparse", ["loss.entropy_coef=0"], method=f"{track}/luffy")
        assert gradient(settings, policy=policy, author=None) == pytest.approx(weight, abs=1e-4)


def test_luffy_of_its_script_takes_the_mean_off_and_does_not_divide():
    rewards = [0.0] * 7 + [1.0]
    assert advantages(recipe("reference/luffy"), rewards, 1).tolist() == [-0.125] * 7 + [0.875]
    # the common core divides by the deviation .353553
    assert advantages(recipe("matched/luffy"), rewards, 1)[-1].item() == pytest.approx(2.474874, abs=1e-5)


@pytest.mark.parametrize("track", ["matched", "reference"])
def test_exgrpo_shapes_the_ratio_to_the_past_and_so_damps_a_near_replay_twelvefold(track):
    settings = recipe(f"{track}/exgrpo")
    # w = policy / past: 1 gives .0826, .1 gives .25; 5 gives .1 * 5 / 5.1^2 = .0192, though it is far above the clip
    for policy, past, weight in ((0.4, 0.4, 0.0826), (0.04, 0.4, 0.25), (0.5, 0.1, 0.0192)):
        assert gradient(settings, policy=policy, author=past) == pytest.approx(weight, abs=1e-4)


def test_rlep_treats_an_added_answer_as_on_policy_whoever_wrote_it():
    settings = load_recipe("micro-sparse", method="reference/rlep")
    for author in (0.01, 0.9):
        assert gradient(settings, policy=0.2, author=author) == pytest.approx(1.0)
    # two right ones beside 16 wrong: mean 1/9, sd sqrt((2 (8/9)^2 + 16 (1/9)^2) / 17) = .323381
    found = advantages(settings, [0.0] * 16 + [1.0] * 2, 2)
    assert found[-1].item() == pytest.approx(8 / 9 / 0.323381, abs=1e-4)
    assert found[0].item() == pytest.approx(-1 / 9 / 0.323381, abs=1e-4)


def test_npo_follows_the_ratio_to_the_guide_up_to_the_clip():
    settings = recipe("reference/npo")
    assert gradient(settings, policy=0.2, author=0.4) == pytest.approx(0.5)
    assert gradient(settings, policy=0.5, author=0.4) == pytest.approx(1.25)
    # 1.5 is above 1 + .28: cut
    assert gradient(settings, policy=0.6, author=0.4) == 0.0
    assert advantages(settings, [0.0] * 7 + [1.0], 1)[-1].item() == pytest.approx(2.474874, abs=1e-5)


def test_npo_without_correction_pushes_with_weight_one():
    # the micro recipes' own choice, which the matched track keeps
    settings = load_recipe("micro-sparse", method="matched/npo")
    assert gradient(settings, policy=0.01, author=0.9) == pytest.approx(1.0)


def test_a_bad_trace_is_pushed_down_with_the_same_weight():
    settings = load_recipe("micro-sparse", ["loss.entropy_coef=0"], method="reference/luffy")
    assert gradient(settings, policy=0.1, author=None, advantage=-1.0) == pytest.approx(-0.25, abs=1e-4)


def test_a_row_that_is_not_clipped_keeps_its_gradient_and_an_own_one_may_lose_its_clip_too():
    far = recipe("matched/npo-late", "guide.inject.clip_off_policy=false")
    assert gradient(far, policy=0.6, author=0.4) == pytest.approx(1.5)


def test_the_own_baseline_leaves_foreign_rewards_out_of_mean_and_deviation():
    settings = recipe("matched/grpo", "guide.inject.baseline=on_policy")
    # own rewards 0 0 1: mean 1/3, sd .57735; the foreign 1 stands (2/3) / .57735 above them
    assert advantages(settings, [0.0, 0.0, 1.0, 1.0], 1).tolist() == pytest.approx(
        [-0.57735, -0.57735, 1.1547, 1.1547], abs=1e-4
    )
    # own rewards all 0: no deviation to divide by, so the foreign one gets its plain distance
    assert advantages(settings, [0.0, 0.0, 0.0, 1.0], 1).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_every_method_of_the_table_is_there_in_both_tracks():
    table = {"grpo", "luffy", "exgrpo", "rlep", "npo-early", "npo-late", "npo", "autonpo"}
    for track in ("matched", "reference"):
        assert {name.partition("/")[2] for name in list_method_names() if name.startswith(track)} == table
