import math

import pytest
from torch import tensor

from npo_cli.config.guides import InjectSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.losses.importance_ratio import (
    RatioAnchor,
    check_ratio_available,
    importance_ratio,
    log_ratio,
    name_ratios_without_logprobs,
)
from npo_cli.losses.policy_loss import compute_columns
from npo_cli.losses.types import LossInputs
from npo_cli.registry import IMPORTANCE_RATIOS
from tests.losses.builders import make_rows, mismatch_settings

CURRENT = [[-1.0, -2.0], [-1.0, -2.0]]
OLD = tensor([[-1.5, -2.5], [-1.5, -2.5]])
BEHAVIOR = tensor([[-9.0, -9.0], [-3.0, -2.0]])
"""Row 0 is on-policy, row 1 off-policy."""


def columns(ratio, *, old=OLD, behavior=BEHAVIOR, cap=2.0, current=CURRENT, mask=((1, 1), (1, 1))):
    rows = make_rows([1.0, 1.0], mask=list(mask), behavior=behavior, old=old, is_off_policy=[0, 1])
    inject = InjectSettings(ratio=ratio, decoupled_cap=cap)
    return compute_columns(
        tensor(current), rows, IMPORTANCE_RATIOS.get(inject.ratio), inject, mismatch_settings("off")
    )[0]


def anchors(ratio, **changes):
    """Log-probabilities that the ratios are anchored on."""
    tokens = columns(ratio, **changes)
    return (tokens.logps_NT - tokens.log_ratio_NT).tolist()


@pytest.mark.parametrize("name", IMPORTANCE_RATIOS.names())
def test_importance_ratio_has_its_registered_name(name):
    assert IMPORTANCE_RATIOS.get(name).name == name


@pytest.mark.parametrize("ratio", IMPORTANCE_RATIOS.names())
def test_importance_ratio_of_on_policy_tokens_is_to_the_old_policy(ratio):
    tokens = columns(ratio)
    assert anchors(ratio)[0] == [-1.5, -2.5]
    assert tokens.weight_NT[0].tolist() == [1.0, 1.0]
    assert tokens.unclipped_NT[0].tolist() == [False, False]


def test_importance_ratio_exact_is_to_the_behavior_policy():
    assert anchors("exact")[1] == [-3.0, -2.0]
    assert columns("exact").weight_NT[1].tolist() == [1.0, 1.0]
    assert not columns("exact").unclipped_NT.any()


def test_importance_ratio_proximal_is_to_the_old_policy():
    assert anchors("proximal")[1] == [-1.5, -2.5]
    assert columns("proximal").weight_NT[1].tolist() == [1.0, 1.0]


def test_importance_ratio_decoupled_weighs_by_old_over_behavior_up_to_the_cap():
    assert anchors("decoupled")[1] == [-1.5, -2.5]
    # exp(-1.5 + 3) = 4.48, capped at 2; exp(-2.5 + 2) = 0.606531
    assert columns("decoupled").weight_NT[1].tolist() == pytest.approx([2.0, 0.606531], abs=1e-6)


def test_importance_ratio_unit_is_the_probability_itself():
    assert anchors("unit")[1] == [0.0, 0.0]


def test_importance_ratio_none_is_one_and_never_clipped():
    assert anchors("none")[1] == [-1.0, -2.0]
    assert columns("none").weight_NT[1].tolist() == [1.0, 1.0]
    assert columns("none").unclipped_NT.tolist() == [[False, False], [True, True]]


def test_importance_ratio_without_old_logprobs_uses_the_current_ones():
    assert anchors("exact", old=None) == [[-1.0, -2.0], [-3.0, -2.0]]
    # exp(-1 + 3) = 7.39, capped at 5; exp(-2 + 2) = 1
    assert columns("decoupled", old=None, cap=5.0).weight_NT[1].tolist() == [5.0, 1.0]


@pytest.mark.parametrize("ratio", IMPORTANCE_RATIOS.names())
def test_importance_ratio_weights_carry_no_gradient(ratio):
    rows = make_rows([1.0, 1.0], mask=[[1, 1], [1, 1]], behavior=BEHAVIOR, is_off_policy=[0, 1])
    current = tensor(CURRENT, requires_grad=True)
    tokens, _ = compute_columns(
        current, rows, IMPORTANCE_RATIOS.get(ratio), InjectSettings(ratio=ratio), mismatch_settings("off")
    )
    assert not tokens.weight_NT.requires_grad
    # d log rho / d log pi = 1: the anchor is a constant
    tokens.log_ratio_NT.sum().backward()
    assert current.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("ratio", IMPORTANCE_RATIOS.names())
def test_importance_ratio_reads_behavior_logprobs_only_if_it_says_so(ratio):
    tokens = columns(ratio, behavior=tensor([[-9.0, -9.0], [math.nan, math.nan]]))
    is_known = tokens.log_ratio_NT[1].isfinite() & tokens.weight_NT[1].isfinite()
    assert is_known.all().item() != IMPORTANCE_RATIOS.get(ratio).needs_logprobs


def test_importance_ratio_must_return_an_anchor_of_every_token():
    for name, wrong in (
        ("bare", lambda logps: logps.old_NT),
        ("row", lambda logps: RatioAnchor(logps_NT=logps.old_NT[0])),
    ):
        added = importance_ratio(name, needs_logprobs=False)(lambda logps, _settings, wrong=wrong: wrong(logps))
        with (
            IMPORTANCE_RATIOS.registered(added),
            pytest.raises(RunFailed, match=f"ratio={name} returned no RatioAnchor"),
        ):
            columns(name)


def test_importance_ratio_does_not_read_padding():
    behavior = tensor([[0.0, 0.0], [-3.0, math.nan]])
    assert anchors("exact", behavior=behavior, mask=((1, 1), (1, 0)))[1] == [-3.0, 0.0]


def test_importance_ratio_is_clamped_at_20():
    assert log_ratio(tensor([-1.0, -50.0, 0.0]), tensor([-1.5, -1.0, -50.0])).tolist() == [0.5, -20.0, 20.0]


def test_importance_ratio_that_needs_logprobs_is_refused_without_them():
    check_ratio_available("proximal", has_logprobs=False, guide="guide 'late'")
    check_ratio_available("exact", has_logprobs=True, guide="guide 'late'")
    for ratio in ("exact", "decoupled"):
        with pytest.raises(NpoError) as caught:
            check_ratio_available(ratio, has_logprobs=False, guide="guide 'late'")
        assert str(caught.value.message) == (
            f"guide 'late' has no log-probabilities: guide.inject.ratio={ratio} is not available"
        )
        assert caught.value.hint == f"use guide.inject.ratio={name_ratios_without_logprobs()}"


def test_importance_ratio_can_differ_within_a_response():
    # two tokens of a guide without log-probabilities, then two that the policy sampled at -1.5 and -2.5
    current = tensor([[-1.0, -2.0, -1.0, -2.0]], requires_grad=True)
    inputs = LossInputs(
        mask_NT=tensor([[True, True, True, True]]),
        off_policy_NT=tensor([[True, True, False, False]]),
        behavior_logps_NT=tensor([[math.nan, math.nan, -1.5, -2.5]]),
        advantages_N=tensor([1.0]),
        old_logps_NT=tensor([[-1.1, -2.1, -1.5, -2.5]]),
    )
    tokens, _ = compute_columns(
        current, inputs, IMPORTANCE_RATIOS.get("unit"), InjectSettings(ratio="unit"), mismatch_settings("token_tis")
    )
    assert (tokens.logps_NT - tokens.log_ratio_NT)[0].tolist() == pytest.approx([0.0, 0.0, -1.5, -2.5])
    assert tokens.weight_NT[0].tolist() == [1.0, 1.0, 1.0, 1.0]


def test_importance_ratio_of_another_module_is_used_by_its_name():
    @importance_ratio("half", needs_logprobs=False)
    def half_ratio(logps, _settings):
        return RatioAnchor(logps_NT=logps.old_NT, weight_NT=0.5)

    with IMPORTANCE_RATIOS.registered(half_ratio):
        inject = InjectSettings(ratio="half")
        rows = make_rows([1.0, 1.0], mask=[[1, 1], [1, 1]], behavior=BEHAVIOR, old=OLD, is_off_policy=[0, 1])
        tokens, _ = compute_columns(
            tensor(CURRENT), rows, IMPORTANCE_RATIOS.get(inject.ratio), inject, mismatch_settings("off")
        )
        assert tokens.weight_NT.tolist() == [[1.0, 1.0], [0.5, 0.5]]
