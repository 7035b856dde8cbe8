"""Dense targets in the loss: token weights of a hand-computed group, and the divergence as a term."""

import math

import pytest
import torch
from torch import Tensor, tensor

from npo_cli.config.guides import InjectSettings
from npo_cli.config.recipe import LossSettings
from npo_cli.config.target import TargetSettings
from npo_cli.errors import RunFailed
from npo_cli.losses.policy_loss import make_policy_loss
from npo_cli.losses.target import Target
from npo_cli.losses.types import LossInputs, LossStats, TargetInputs
from npo_cli.registry import TARGETS
from tests.losses.builders import divisors_of, make_rows, mismatch_settings

ADVANTAGES = [1.0, -0.5]
MASK = [[1, 1, 1], [1, 1, 0]]
CURRENT = [[0.5, 0.5, 0.5], [0.5, 0.5, 0.9]]
"""Probabilities of the tokens under the policy; the last of the second row is padding."""
TEACHER = [[0.55, 0.9, 0.25], [0.55, 0.9, 0.1]]
"""Under the teacher: ratios 1.1, 1.8 and .5 in a correct response, 1.1 and 1.8 in a wrong one."""


def settings(**changes: object) -> TargetSettings:
    return TargetSettings(teacher="checkpoint:80", **changes)


def compute_loss(
    target_settings: TargetSettings, target: TargetInputs | None, logps_NT: Tensor, rows: LossInputs, **loss: object
) -> tuple[Tensor, LossStats]:
    policy_loss = make_policy_loss(LossSettings(**loss), InjectSettings(), mismatch_settings("off"), target_settings)
    return policy_loss(logps_NT, rows, divisors=divisors_of(rows), target=target)


def inputs(coefficient: float, logps_NT: Tensor, **changes: object) -> TargetInputs:
    return TargetInputs(coefficient=coefficient, old_logps_NT=logps_NT.detach(), **changes)


def token_gradients(coefficient: float, **changes: object) -> tuple[Tensor, LossStats]:
    """-dL/dl per token, times the divisors: A_t of each token before the first update."""
    logps_NT = tensor(CURRENT).log().requires_grad_()
    rows = make_rows(ADVANTAGES, mask=MASK)
    target = inputs(coefficient, logps_NT, teacher_logps_NT=tensor(TEACHER).log())
    value, stats = compute_loss(settings(kind="token_weight", **changes), target, logps_NT, rows)
    (gradient,) = torch.autograd.grad(value, logps_NT)
    # seq_mean_token_mean: 1/2 of each row, 1/3 and 1/2 of each token
    return -gradient * tensor([[6.0], [4.0]]), stats


@pytest.mark.parametrize("name", TARGETS.names())
def test_target_is_registered_under_its_name(name):
    target = TARGETS.get(name)
    assert (target.name, target.reads == "nothing") == (name, name == "none")


def test_target_token_weights_by_hand():
    advantages, stats = token_gradients(1.0)
    # clip(1.1), clip(1.8), clip(.5) to [.8, 1.2]; in the wrong response 1/1.1 = .909091, 1/1.8 -> .8
    expected = [[1.1, 1.2, 0.8], [-0.5 * 0.909091, -0.5 * 0.8, 0.0]]
    assert advantages.tolist() == [pytest.approx(row, abs=1e-5) for row in expected]
    metrics = stats.metrics()
    assert metrics["target/weight_mean"] == pytest.approx((1.1 + 1.2 + 0.8 + 0.909091 + 0.8) / 5, abs=1e-6)
    assert metrics["target/clipped_fraction"] == pytest.approx(3 / 5)
    # k3 of w = 1.1, 1.8, .5, 1.1, 1.8: w - 1 - ln w = .004690, .212213, .193147, .004690, .212213
    assert metrics["target/kl"] == pytest.approx(0.125391, abs=1e-5)
    assert stats.target_tokens == 5


@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_target_token_weights_are_mixed_with_1(coefficient):
    whole, mixed = token_gradients(1.0)[0], token_gradients(coefficient)[0]
    plain = tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, 0.0]])
    assert torch.allclose(mixed, (1 - coefficient) * plain + coefficient * whole, atol=1e-6)


def test_target_token_weights_never_change_the_sign_of_an_advantage():
    advantages, _ = token_gradients(1.0, clip_range=1.0)
    # Up to [0, 2]: 1.8 is not clipped, and no weight is below 0.
    assert advantages[0].tolist() == pytest.approx([1.1, 1.8, 0.5], abs=1e-5)
    assert (advantages[1] <= 0).all()


@pytest.mark.parametrize("kind", ["grpo", "gspo_token", "cispo"])
def test_target_token_weight_is_a_factor_on_the_advantage(kind):
    # One token a row: its weight, 1.1 and 1/1.1, may as well be in the row's advantage, clipped or not.
    logps_NT, old_NT = tensor([[0.6], [0.4]]).log().requires_grad_(), tensor([[0.5], [0.5]]).log()
    teacher_NT = tensor([[0.55], [0.55]]).log()
    found = []
    for advantages, has_target in (([1.0, -1.0], True), ([1.1, -1 / 1.1], False)):
        rows = make_rows(advantages, mask=[[1], [1]], old=old_NT)
        target = TargetInputs(coefficient=1.0, old_logps_NT=old_NT, teacher_logps_NT=teacher_NT) if has_target else None
        value, _ = compute_loss(settings(kind="token_weight"), target, logps_NT, rows, kind=kind)
        (gradient,) = torch.autograd.grad(value, logps_NT)
        found.append([value.item(), *gradient.flatten().tolist()])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert any(found[0])


@pytest.mark.parametrize("aggregation", ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"])
def test_target_divergence_is_a_term_aggregated_like_the_policy_loss(aggregation):
    logps_NT = tensor(CURRENT).log().requires_grad_()
    divergences_NT = tensor([[0.1, 0.2, 0.3], [0.4, 0.6, math.nan]], requires_grad=True)
    rows = make_rows([0.0, 0.0], mask=MASK)
    target = inputs(2.0, logps_NT, divergences_NT=divergences_NT)
    value, stats = compute_loss(settings(kind="distribution"), target, logps_NT, rows, aggregation=aggregation)
    # means .2 and .5, and 1.6 over 5 tokens; 2 rows of at most 3 tokens
    expected = {"seq_mean_token_mean": 0.35, "token_mean": 1.6 / 5, "seq_mean_token_sum_norm": 1.6 / 6}
    assert value.item() == pytest.approx(2 * expected[aggregation])
    (gradient,) = torch.autograd.grad(value, divergences_NT)
    assert gradient[1, 2] == 0
    assert gradient.sum().item() == pytest.approx(
        2 * {"seq_mean_token_mean": 1.0, "token_mean": 1.0, "seq_mean_token_sum_norm": 5 / 6}[aggregation]
    )
    assert stats.metrics()["target/kl"] == pytest.approx(1.6 / 5)
    assert "target/weight_mean" not in stats.metrics()


def test_loss_without_target_rows_is_the_plain_loss():
    logps_NT, rows = tensor(CURRENT).log(), make_rows(ADVANTAGES, mask=MASK)
    plain, plain_stats = compute_loss(TargetSettings(), None, logps_NT, rows)
    for kind in ("token_weight", "distribution"):
        value, stats = compute_loss(settings(kind=kind), None, logps_NT, rows)
        assert (value.item(), stats) == (plain.item(), plain_stats)


def test_target_from_a_plug_in():
    """Imitates the teacher's certainty: -log pi_teacher of each token, as a term."""
    surprise = Target(
        name="surprise", reads="logps", per_token=lambda tokens, target: -target.teacher_logps_NT * tokens.logps_NT
    )
    with TARGETS.registered(surprise):
        logps_NT, rows = tensor(CURRENT).log(), make_rows([0.0, 0.0], mask=MASK)
        target = inputs(1.0, logps_NT, teacher_logps_NT=tensor(TEACHER).log())
        value, _ = compute_loss(settings(kind="surprise"), target, logps_NT, rows, aggregation="token_mean")
    # -ln p_teacher ln .5 over 5 tokens: ln .5 (.5978 + .1054 + 1.3863 + .5978 + .1054) / 5
    assert value.item() == pytest.approx(math.log(0.5) * 2.792643 / 5, abs=1e-5)


@pytest.mark.parametrize(
    "returned",
    [{"per_token": lambda *_: torch.zeros(3)}, {"factors": lambda *_: torch.ones(2, 3)}],
    ids=["per token", "factors"],
)
def test_target_of_a_plug_in_that_returns_something_else_is_refused_by_name(returned):
    with TARGETS.registered(Target(name="odd", reads="logps", **returned)):
        logps_NT, rows = tensor(CURRENT).log(), make_rows(ADVANTAGES, mask=MASK)
        target = inputs(1.0, logps_NT, teacher_logps_NT=tensor(TEACHER).log())
        with pytest.raises(RunFailed, match=r"target\.kind=odd returned no"):
            compute_loss(settings(kind="odd"), target, logps_NT, rows)


# Window and schedule


def test_target_window_and_linear_schedule():
    # RLSD's: 1/2 down to 0 over 50 steps
    linear = settings(kind="token_weight", weight=0.5, schedule="linear", num_steps=50)
    at = {step: linear.coefficient_at(step, start_step=40) for step in (40, 41, 66, 90, 91)}
    assert at == {40: None, 41: 0.5, 66: 0.25, 90: pytest.approx(0.01), 91: None}
    constant = settings(kind="distribution", weight=2.0)
    assert [constant.coefficient_at(step, start_step=3) for step in (3, 4, 9999)] == [None, 2.0, 2.0]
    assert TargetSettings().coefficient_at(1, start_step=0) is None
