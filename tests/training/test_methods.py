"""Each method of the paper's table on one group that is worked out by hand (algorithms, sections 4, 5, 6, 7 and 13).

Eight slots of one token: seven wrong on-policy ones and a correct injected one, before any update.
Tested is the weight on grad log pi of the off-policy token, for an advantage of 1 and without the
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


def gradient(settings: Recipe, *, policy: float, behavior: float | None, advantage: float = 1.0) -> float:
    """-dL/dl of an off-policy token of probability `policy` under the policy and `behavior` under the guide."""
    logps_NT = tensor([[math.log(policy)]], requires_grad=True)
    known = math.nan if behavior is None else math.log(behavior)
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


def advantages(settings: Recipe, rewards: list[float], num_off_policy: int) -> Tensor:
    baseline_PG = tensor([[True] * (len(rewards) - num_off_policy) + [False] * num_off_policy])
    baseline_PG = baseline_PG if settings.guide.inject.baseline == "on_policy" else None
    loss = settings.loss
    return group_advantages(
        tensor([rewards]), divide_by_std=loss.divide_by_std, eps=loss.adv_eps, baseline_PG=baseline_PG
    )[0]


@pytest.mark.parametrize("track", ["matched", "reference"])
def test_method_luffy_shapes_the_probability(track):
    # gamma p / (p + gamma)^2 with gamma = .1: .0826 at .01, .25 at .1, .1389 at .5, .0826 at 1
    for policy, weight in ((0.01, 0.0826), (0.1, 0.25), (0.5, 0.1389), (1.0, 0.0826)):
        settings = load_recipe("micro-sparse", ["loss.entropy_coef=0"], method=f"{track}/luffy")
        assert gradient(settings, policy=policy, behavior=None) == pytest.approx(weight, abs=1e-4)


def test_method_luffy_reference_does_not_divide_by_std():
    rewards = [0.0] * 7 + [1.0]
    assert advantages(recipe("reference/luffy"), rewards, 1).tolist() == [-0.125] * 7 + [0.875]
    # the common core divides by the deviation .353553
    assert advantages(recipe("matched/luffy"), rewards, 1)[-1].item() == pytest.approx(2.474874, abs=1e-5)


@pytest.mark.parametrize("track", ["matched", "reference"])
def test_method_exgrpo_shapes_the_ratio(track):
    settings = recipe(f"{track}/exgrpo")
    # w = policy / past: 1 gives .0826, .1 gives .25; 5 gives .1 * 5 / 5.1^2 = .0192, though it is far above the clip
    for policy, past, weight in ((0.4, 0.4, 0.0826), (0.04, 0.4, 0.25), (0.5, 0.1, 0.0192)):
        assert gradient(settings, policy=policy, behavior=past) == pytest.approx(weight, abs=1e-4)


def test_method_rlep_treats_an_added_response_as_on_policy():
    settings = load_recipe("micro-sparse", method="reference/rlep")
    for behavior in (0.01, 0.9):
        assert gradient(settings, policy=0.2, behavior=behavior) == pytest.approx(1.0)
    # two right ones beside 16 wrong: mean 1/9, sd sqrt((2 (8/9)^2 + 16 (1/9)^2) / 17) = .323381
    found = advantages(settings, [0.0] * 16 + [1.0] * 2, 2)
    assert found[-1].item() == pytest.approx(8 / 9 / 0.323381, abs=1e-4)
    assert found[0].item() == pytest.approx(-1 / 9 / 0.323381, abs=1e-4)


def test_method_npo_uses_the_ratio_to_the_guide_up_to_the_clip():
    settings = recipe("reference/npo")
    assert gradient(settings, policy=0.2, behavior=0.4) == pytest.approx(0.5)
    assert gradient(settings, policy=0.5, behavior=0.4) == pytest.approx(1.25)
    # 1.5 is above 1 + .28: cut
    assert gradient(settings, policy=0.6, behavior=0.4) == 0.0
    assert advantages(settings, [0.0] * 7 + [1.0], 1)[-1].item() == pytest.approx(2.474874, abs=1e-5)


def test_method_npo_of_the_authors_never_clips_the_guide_slot_in_the_first_update():
    settings = load_recipe("micro-sparse", method="authors/npo")
    # the denominator is the learner's own old policy, here the current one: the ratio is 1 whatever the guide's is
    for behavior in (0.01, 0.4, 0.9):
        assert gradient(settings, policy=0.6, behavior=behavior) == pytest.approx(1.0)
    assert (settings.loss.aggregation, settings.loss.clip_high, settings.loss.dual_clip) == ("token_mean", 0.28, 3.0)
    assert settings.loss == recipe("authors/grpo").loss
    assert settings.train == recipe("authors/grpo").train


def test_method_npo_matched_has_weight_one():
    # the micro recipes' own choice, which the matched track keeps
    settings = load_recipe("micro-sparse", method="matched/npo")
    assert gradient(settings, policy=0.01, behavior=0.9) == pytest.approx(1.0)


def test_method_luffy_of_a_wrong_trace():
    settings = load_recipe("micro-sparse", ["loss.entropy_coef=0"], method="reference/luffy")
    assert gradient(settings, policy=0.1, behavior=None, advantage=-1.0) == pytest.approx(-0.25, abs=1e-4)


def test_method_without_off_policy_clip():
    far = recipe("matched/npo-late", "guide.inject.clip_off_policy=false")
    assert gradient(far, policy=0.6, behavior=0.4) == pytest.approx(1.5)


def test_advantage_baseline_on_policy():
    settings = recipe("matched/grpo", "guide.inject.baseline=on_policy")
    # on-policy rewards 0 0 1: mean 1/3, sd .57735; the injected 1 stands (2/3) / .57735 above them
    assert advantages(settings, [0.0, 0.0, 1.0, 1.0], 1).tolist() == pytest.approx(
        [-0.57735, -0.57735, 1.1547, 1.1547], abs=1e-4
    )
    # on-policy rewards all 0: no deviation to divide by, so the injected one gets its plain distance
    assert advantages(settings, [0.0, 0.0, 0.0, 1.0], 1).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_methods_are_in_both_tracks():
    table = {"grpo", "luffy", "exgrpo", "rlep", "npo-early", "npo-late", "npo", "autonpo"}
    # Without a published recipe for this trainer:
    dense = {"distill", "distill-scout", "token-weight", "rlsd", "b-opsd", "policy-reheater"}
    rivals = {"sft-then-grpo", "adaptive-entropy", "mistakes-first", "rejoin", "prefix", "lazy-guide", "rl-extra"}
    rivals |= {"remind"}
    ours = {"npo-scout", "autonpo-ladder"}
    for track, names in (("matched", table | dense | rivals | ours), ("reference", table | {"remind"})):
        assert {name.partition("/")[2] for name in list_method_names() if name.startswith(track)} == names
    authors = {name.partition("/")[2] for name in list_method_names() if name.startswith("authors/")}
    assert authors == {"grpo", "npo-early", "npo-late", "npo", "autonpo"}
