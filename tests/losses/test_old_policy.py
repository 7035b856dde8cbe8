"""loss.old_policy: which policy the clipped ratio of on-policy rollouts is taken to."""

from dataclasses import replace

import pytest
import torch
from torch import tensor

from tests.losses.builders import divisors_of, make_loss, make_rows, mismatch_settings

MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
ADVANTAGES = [1.0, -0.5, 0.8]
LOGPS_NT = tensor([[-0.5, -1.0, -0.7], [-0.2, -0.9, 0.0], [-0.4, -0.3, -1.1]])
STALE_NT = LOGPS_NT + tensor([[0.1, -0.4, 0.3], [-0.05, 0.5, 0.0], [0.2, -0.1, 0.6]])
"""Under the policy that sampled the rows, some steps ago; the last row is a guide's."""


def run(loss, rows):
    logps_NT = LOGPS_NT.clone().requires_grad_()
    value, stats = loss(logps_NT, rows, divisors=divisors_of(rows))
    value.backward()
    return value.detach(), logps_NT.grad, stats


@pytest.mark.parametrize("kind", ["grpo", "gspo", "gspo_token", "cispo"])
@pytest.mark.parametrize("old", [None, LOGPS_NT + 0.05], ids=["one update", "several updates"])
def test_behavior_as_old_policy_is_plain_clipping_against_the_sampler(kind, old):
    """The same loss as if the sampler's weights had been those at the start of the step, which need no correction."""
    rows = make_rows(ADVANTAGES, mask=MASK, behavior=STALE_NT, old=old)
    value, gradient, _ = run(make_loss(kind=kind, old_policy="behavior"), rows)
    plain = run(make_loss(kind=kind), replace(rows, old_logps_NT=STALE_NT))
    torch.testing.assert_close((value, gradient), plain[:2])


def test_behavior_as_old_policy_clips_with_one_update():
    """Row 0, A = 1: ratios exp(-.1), exp(.4), exp(-.3), and 1.49 is above 1.2. Row 1, A = -.5: 1.05, and exp(-.5) = .61
    is below .8. Ratios to the current policy are 1, and never clipped."""
    rows = make_rows(ADVANTAGES[:2], mask=MASK[:2], behavior=STALE_NT[:2])
    logps_NT = LOGPS_NT[:2]
    for old_policy, low, high in (("behavior", 1, 1), ("proximal", 0, 0)):
        _, stats = make_loss(old_policy=old_policy)(logps_NT, rows, divisors=divisors_of(rows))
        assert (stats.clipped_low, stats.clipped_high) == (low, high)


def test_proximal_policy_weights_stale_tokens_and_truncates():
    """d loss / d logp = -A w / (N T): w = exp(log pi - log mu), at most 1.3."""
    rows = make_rows(ADVANTAGES[:1], mask=MASK[:1], behavior=STALE_NT[:1])
    logps_NT = LOGPS_NT[:1].clone().requires_grad_()
    loss, _ = make_loss(mismatch=mismatch_settings("token_tis", cap=1.3))(logps_NT, rows, divisors=divisors_of(rows))
    loss.backward()
    weights_T = (LOGPS_NT[0] - STALE_NT[0]).exp().clamp(max=1.3)
    torch.testing.assert_close(logps_NT.grad[0], -weights_T / 3)


def test_old_policy_leaves_injected_rows_alone():
    rows = make_rows(ADVANTAGES, mask=MASK, behavior=STALE_NT, is_off_policy=[0, 0, 1])
    proximal, behavior = (run(make_loss(old_policy=each, ratio="proximal"), rows) for each in ("proximal", "behavior"))
    torch.testing.assert_close(proximal[1][2], behavior[1][2])
    assert not torch.equal(proximal[1][:2], behavior[1][:2])


def test_mismatch_is_measured_whatever_the_old_policy_is():
    rows = make_rows(ADVANTAGES, mask=MASK, behavior=STALE_NT)
    found = [run(make_loss(old_policy=each), rows)[2].mismatch for each in ("proximal", "behavior")]
    assert found[0].k1_sum == found[1].k1_sum != 0
    assert found[0].weight_sum == found[1].weight_sum
    assert found[1].clipped_tokens == 0
