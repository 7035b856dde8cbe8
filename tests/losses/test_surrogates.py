import math

import pytest
import torch
from torch import tensor

from npo_cli.config.recipe import LossSettings
from npo_cli.losses.importance_ratio import log_ratio
from npo_cli.losses.policy_loss import cispo, grpo, gspo, gspo_token, kl_to_reference
from npo_cli.losses.types import TokenColumns


def make_columns(logps_NT, anchor_NT, *, advantage=1.0, unclipped=False, ref_logps_NT=None):
    """One row of on-policy tokens."""
    mask_NT = torch.ones_like(logps_NT, dtype=torch.bool)
    return TokenColumns(
        logps_NT=logps_NT,
        log_ratio_NT=log_ratio(logps_NT, anchor_NT),
        weight_NT=torch.ones_like(logps_NT),
        behavior_logps_NT=torch.zeros_like(logps_NT),
        mask_NT=mask_NT,
        off_policy_NT=~mask_NT,
        unclipped_NT=mask_NT & unclipped,
        advantages_N1=tensor([[advantage]]),
        shaping_gamma=None,
        ref_logps_NT=ref_logps_NT,
        entropies_NT=None,
    )


def surrogate(function, ratios, *, advantage, unclipped=False, **changes):
    """Loss, gradient on log pi and gradient factor, given ratios to an anchor of log-probability -1 per token."""
    logps_NT = (tensor([ratios]).log() - 1.0).requires_grad_()
    tokens = make_columns(logps_NT, tensor(-1.0), advantage=advantage, unclipped=unclipped)
    terms = function(tokens, LossSettings(**changes))
    (gradient_NT,) = torch.autograd.grad(terms.loss_NT.sum(), logps_NT)
    return terms.loss_NT[0].tolist(), gradient_NT[0].tolist(), terms.gradient_factor_NT[0].tolist()


def test_clipped_surrogate_of_positive_advantage():
    loss, gradient, factor = surrogate(grpo, [0.5, 1.0, 1.1, 1.5], advantage=2.0)
    # -min(rho A, clip(rho, 0.8, 1.2) A): 1.5 is cut to 1.2 and loses its gradient, 0.5 is not
    assert loss == pytest.approx([-1.0, -2.0, -2.2, -2.4])
    assert gradient == pytest.approx([-1.0, -2.0, -2.2, 0.0])
    assert factor == pytest.approx([0.5, 1.0, 1.1, 0.0])


def test_clipped_surrogate_of_negative_advantage():
    loss, gradient, factor = surrogate(grpo, [0.5, 1.0, 1.1, 1.5], advantage=-2.0)
    # the mirror image: 0.5 is lifted to 0.8 and loses its gradient, 1.5 is not cut
    assert loss == pytest.approx([1.6, 2.0, 2.2, 3.0])
    assert gradient == pytest.approx([0.0, 2.0, 2.2, 3.0])
    assert factor == pytest.approx([0.0, 1.0, 1.1, 1.5])


def test_clip_higher():
    assert surrogate(grpo, [1.25], advantage=1.0, clip_high=0.28)[1] == pytest.approx([-1.25])
    assert surrogate(grpo, [1.25], advantage=1.0, clip_high=0.2)[1] == [0.0]
    assert surrogate(grpo, [0.79], advantage=-1.0, clip_high=0.28)[1] == [0.0]


def test_dual_clip_caps_negative_advantages():
    loss, gradient, factor = surrogate(grpo, [2.0, 5.0], advantage=-1.0, dual_clip=3.0)
    # at most c |A| = 3
    assert loss == pytest.approx([2.0, 3.0])
    assert gradient == pytest.approx([2.0, 0.0])
    assert factor == pytest.approx([2.0, 0.0])
    assert surrogate(grpo, [0.5, 5.0], advantage=1.0, dual_clip=3.0)[0] == pytest.approx([-0.5, -1.2])


def test_delta_caps_the_ratio_of_negative_advantages():
    loss, gradient, factor = surrogate(grpo, [1.5, 5.0], advantage=-1.0, delta=2.0)
    assert loss == pytest.approx([1.5, 2.0])
    assert gradient == pytest.approx([1.5, 0.0])
    assert factor == pytest.approx([1.5, 0.0])


def test_unclipped_tokens_have_no_clip_and_no_cap():
    for advantage in (1.0, -1.0):
        loss, gradient, _ = surrogate(grpo, [0.01, 50.0], advantage=advantage, unclipped=True, dual_clip=3.0, delta=2.0)
        assert loss == pytest.approx([-0.01 * advantage, -50.0 * advantage])
        assert gradient == pytest.approx([-0.01 * advantage, -50.0 * advantage])
    assert surrogate(cispo, [50.0], advantage=1.0, unclipped=True)[1] == pytest.approx([-50.0])


def test_gspo_clips_the_geometric_mean():
    # ratios 2 and 1/2: s = exp((ln 2 - ln 2) / 2) = 1, so nothing is clipped although both tokens would be.
    # each of the two token losses is -s A; d(-2 s A) / dl_t = -2 A s / 2
    loss, gradient, factor = surrogate(gspo, [2.0, 0.5], advantage=3.0)
    assert loss == pytest.approx([-3.0, -3.0])
    assert gradient == pytest.approx([-3.0, -3.0])
    assert factor == pytest.approx([1.0, 1.0])
    # ratios 1.1 and 1.6: s = sqrt(1.76) = 1.326650, above 1.2, so even the calm token is cut
    loss, gradient, factor = surrogate(gspo, [1.1, 1.6], advantage=3.0)
    assert loss == pytest.approx([-3.6, -3.6])
    assert gradient == [0.0, 0.0]
    assert factor == [0.0, 0.0]
    # ratios 1.1 and 1.05: s = sqrt(1.155) = 1.074709
    assert surrogate(gspo, [1.1, 1.05], advantage=3.0)[0] == pytest.approx([-3.224128] * 2, abs=1e-5)


def test_gspo_token_equals_gspo_for_a_shared_advantage():
    for ratios in ([1.1, 1.05], [0.5, 0.4]):
        for advantage in (3.0, -3.0):
            plain = surrogate(gspo, ratios, advantage=advantage)
            by_token = surrogate(gspo_token, ratios, advantage=advantage)
            for ours, theirs in zip(by_token, plain, strict=True):
                assert ours == pytest.approx(theirs)


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    loss, gradient, factor = surrogate(cispo, [0.1, 1.0, 8.0], advantage=2.0, cispo_cap=5.0)
    assert factor == pytest.approx([0.1, 1.0, 5.0])
    # -weight * A, whatever the sign of A and however low the ratio
    assert gradient == pytest.approx([-0.2, -2.0, -10.0])
    # -weight * A * l with l = ln(rho) - 1
    assert loss == pytest.approx([-0.2 * (math.log(0.1) - 1), 2.0, -10.0 * (math.log(8.0) - 1)], rel=1e-5)
    assert surrogate(cispo, [8.0], advantage=-2.0, cispo_cap=5.0)[1] == pytest.approx([10.0])


def test_clamped_ratio_has_no_gradient():
    for terms_of in (grpo, gspo):
        loss, gradient, factor = surrogate(terms_of, [math.exp(-25.0)], advantage=1.0)
        assert loss == pytest.approx([-math.exp(-20.0)], rel=1e-4)
        assert (gradient, factor) == ([0.0], [0.0])


def test_kl_term_is_k3_of_reference_over_policy():
    logps_NT = tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    kl_NT = kl_to_reference(make_columns(logps_NT, logps_NT.detach(), ref_logps_NT=tensor([[-0.9, -1.0]]).double()))
    # w = exp(0.1): w - 1 - 0.1 = 0.0051709; no distance, no penalty
    assert kl_NT[0].tolist() == pytest.approx([0.0051709, 0.0], abs=1e-7)
    # gradient in l: 1 - w = -0.105171, towards the reference when descending
    kl_NT.sum().backward()
    assert logps_NT.grad[0].tolist() == pytest.approx([1 - math.exp(0.1), 0.0], abs=1e-6)


def test_delta_inside_the_clip_range_is_refused():
    with pytest.raises(
        ValueError, match=r"loss\.delta must be above 1 \+ loss\.clip_high = 1\.2 \(or null\), got 1\.1"
    ):
        LossSettings(delta=1.1, clip_high=0.2)
