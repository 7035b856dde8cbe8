"""Divergences between distributions: by hand, by TRL's distillation loss, and their gradients."""

import math

import pytest
import torch
from torch import Tensor, tensor

from npo_cli.losses.divergence import DIVERGENCES, token_divergence

TRL_BETA = {"forward": 0.0, "reverse": 1.0, "js": 0.5}


def logits_of(probs: list[float]) -> Tensor:
    return tensor([probs], dtype=torch.float64).log()


def random_logits(seed: int, *, width: int = 11) -> Tensor:
    return 3 * torch.randn(7, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # p = (1/2, 1/2), q = (1/4, 3/4): ln(2)/2 + ln(2/3)/2
        ("forward", 0.143841),
        # ln(1/2)/4 + 3 ln(3/2)/4
        ("reverse", 0.130812),
        # m = (3/8, 5/8): (.032269 + .035375)/2
        ("js", 0.033822),
    ],
)
def test_divergence_by_hand(name, value):
    found = token_divergence(logits_of([0.5, 0.5]), logits_of([0.25, 0.75]), name=name)
    assert found.tolist() == pytest.approx([value], abs=1e-6)


def test_divergence_of_the_top_tokens_and_the_rest_by_hand():
    teacher, policy = logits_of([0.1, 0.5, 0.3, 0.1]), logits_of([0.25] * 4)
    # (.5, .3, .2) against (.25, .25, .5): .5 ln 2 + .3 ln 1.2 + .2 ln .4
    assert token_divergence(teacher, policy, name="forward", top_k=2).item() == pytest.approx(0.218012, abs=1e-6)
    whole = token_divergence(teacher, policy, name="forward")
    assert token_divergence(teacher, policy, name="forward", top_k=4).item() == whole.item()
    # .5 ln 2 + .3 ln 1.2 + .2 ln .4: merging equal ratios loses nothing, merging others does
    assert whole.item() == pytest.approx(0.218012, abs=1e-6)
    assert token_divergence(teacher, policy, name="forward", top_k=1).item() < whole.item()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_equals_trl(name):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="the oracle is TRL 1.16")
    teacher, policy = random_logits(0), random_logits(1)
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        policy[None], teacher[None], beta=TRL_BETA[name], temperature=1.0, reduction="none"
    )
    found = token_divergence(teacher, policy, name=name)
    assert torch.allclose(found, expected[0].sum(-1), atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_gradient_equals_finite_differences(name, top_k):
    teacher, policy = random_logits(0), random_logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: token_divergence(teacher, logits, name=name, top_k=top_k), policy)


def test_divergence_gradient_of_forward_kl_is_q_minus_p():
    teacher, policy = random_logits(2), random_logits(3).requires_grad_()
    (found,) = torch.autograd.grad(token_divergence(teacher, policy, name="forward").sum(), policy)
    assert torch.allclose(found, policy.softmax(-1) - teacher.softmax(-1), atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_zero_of_equal_distributions_and_finite_of_suppressed_tokens(name, top_k):
    logits = random_logits(4)
    assert token_divergence(logits + 1.5, logits, name=name, top_k=top_k).abs().max() < 1e-12
    lowest = torch.finfo(torch.float32).min
    teacher, policy = (random_logits(seed).float().index_fill(1, tensor([0, 5]), lowest) for seed in (5, 6))
    policy.requires_grad_()
    found = token_divergence(teacher, policy, name=name, top_k=top_k)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert found.isfinite().all() and gradient.isfinite().all()
    assert gradient[:, [0, 5]].abs().max() == 0


def test_divergence_cuts_a_padded_vocabulary():
    narrow, wide = random_logits(7), torch.cat([random_logits(8), torch.full((7, 2), 5.0, dtype=torch.float64)], dim=1)
    expected = token_divergence(narrow, wide[:, :11], name="forward")
    assert torch.equal(token_divergence(narrow, wide, name="forward"), expected)
    assert not math.isclose(token_divergence(wide, narrow, name="forward")[0].item(), expected[0].item())
