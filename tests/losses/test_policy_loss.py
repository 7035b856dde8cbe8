import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from npo_cli.losses.inference_mismatch import MISMATCH_RULES
from npo_cli.losses.policy_loss import LOSS_TERMS, LossTerm, aggregate
from npo_cli.losses.types import Divisors, LossInputs, LossStats
from tests.losses.builders import (
    divisors_of,
    make_loss,
    make_rows,
    mismatch_settings,
    plain_advantages,
    with_matching_engine,
)

KINDS = ["grpo", "gspo", "gspo_token", "cispo"]
MODES = ["exact", "proximal", "decoupled", "none"]
HOWS = ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"]


def loss_and_gradient(logps_NT: Tensor, rows: LossInputs, **changes: object) -> tuple[float, Tensor, LossStats]:
    """The loss, its gradient on the log-probabilities and the stats of a batch that is not split.

    Engine and trainer agree on on-policy rows; see test_inference_mismatch.py for other engines.
    """
    rows = with_matching_engine(rows, logps_NT)
    leaf_NT = logps_NT.clone().requires_grad_()
    loss, stats = make_loss(**changes)(leaf_NT, rows, divisors=divisors_of(rows))
    (gradient_NT,) = torch.autograd.grad(loss, leaf_NT)
    return loss.item(), gradient_NT, stats


def test_grpo_gradient_before_any_update():
    logps_NT = tensor([[-1.0, -2.0], [-0.5, 9.9]])
    rows = make_rows([2.0, -1.0], mask=[[1, 1], [1, 0]])
    loss, gradient_NT, stats = loss_and_gradient(logps_NT, rows)
    # rho = 1: L = (-2 + 1) / 2; each token of row 0 gets -2 / (2 rows * 2 tokens), that of row 1 +1 / (2 * 1)
    assert loss == pytest.approx(-0.5)
    assert gradient_NT.tolist() == [[-0.5, -0.5], [0.5, 0.0]]
    found = stats.metrics()
    assert (found["clip_ratio/low"], found["clip_ratio/high"]) == (0.0, 0.0)
    assert not any(name.startswith("inject/") for name in found)


def test_dr_grpo_divides_by_the_maximum_length():
    rows = make_rows([0.75, -0.25], mask=[[1, 1, 1, 1], [1, 0, 0, 0]])
    loss, gradient_NT, _ = loss_and_gradient(torch.zeros(2, 4), rows, aggregation="seq_mean_token_sum_norm")
    # L_max = 4, N = 2: -(4 * 0.75 - 1 * 0.25) / 8; a token of either row weighs A / 8
    assert loss == pytest.approx(-2.75 / 8)
    assert gradient_NT[0].tolist() == pytest.approx([-0.09375] * 4)
    assert gradient_NT[1].tolist() == pytest.approx([0.03125, 0, 0, 0])


@pytest.mark.parametrize(
    ("mode", "ratio", "weight"),
    [
        # proximal and none: 1 whatever the distance
        ("proximal", 3.0, 1.0),
        ("none", 3.0, 1.0),
        ("none", 0.1, 1.0),
        # exact: rho where rho <= 1.2, else 0
        ("exact", 0.5, 0.5),
        ("exact", 1.0, 1.0),
        ("exact", 1.19, 1.19),
        ("exact", 1.21, 0.0),
        # decoupled: min(pi_old / pi_behavior, 2), since pi_theta / pi_old = 1
        ("decoupled", 0.5, 0.5),
        ("decoupled", 1.5, 1.5),
        ("decoupled", 3.0, 2.0),
    ],
)
def test_off_policy_gradient_weight_by_ratio_setting(mode, ratio, weight):
    logps_NT = tensor([[-2.0]])
    behavior = logps_NT - math.log(ratio)
    rows = make_rows([1.0], mask=[[1]], behavior=behavior, is_off_policy=[1])
    _, gradient_NT, stats = loss_and_gradient(logps_NT, rows, ratio=mode)
    assert gradient_NT.item() == pytest.approx(-weight, abs=1e-6)
    assert stats.metrics()["inject/tokens_with_gradient"] == float(weight > 0)
    assert stats.metrics()["inject/ratio_mean"] == pytest.approx(ratio)


@pytest.mark.parametrize("kind", KINDS)
def test_off_policy_ratio_none_is_a_score_function(kind):
    # far from both anchors, and below a dual clip and a cap that would cut any other row
    logps_NT = tensor([[-2.0, -1.0]])
    rows = make_rows([-1.5], mask=[[1, 1]], behavior=logps_NT - 3.0, old=logps_NT - 5.0, is_off_policy=[1])
    _, gradient_NT, _ = loss_and_gradient(logps_NT, rows, kind=kind, ratio="none", dual_clip=1.1, cispo_cap=0.5)
    # -A / T on each of the two tokens
    assert gradient_NT.tolist() == [[0.75, 0.75]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_off_policy_ratios_agree_when_the_guide_is_the_policy(kind, mode):
    logps_NT = tensor([[-1.0, -2.0], [-0.5, -3.0]])
    own = make_rows([1.0, -1.0], mask=[[1, 1], [1, 1]], old=logps_NT)
    mixed = replace(own, behavior_logps_NT=logps_NT, off_policy_NT=tensor([[False] * 2, [True] * 2]))
    assert loss_and_gradient(logps_NT, mixed, kind=kind, ratio=mode)[1].equal(
        loss_and_gradient(logps_NT, own, kind=kind)[1]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
def test_off_policy_ratio_proximal_is_plain_grpo(kind, how):
    generator = torch.Generator().manual_seed(0)
    logps_NT = -torch.rand(8, 5, generator=generator)
    # seven failures and one success, which another policy wrote
    advantages = plain_advantages(tensor([[0.0] * 7 + [1.0]]))[0].tolist()
    own = make_rows(advantages, mask=[[1, 1, 1, 1, 1]] * 7 + [[1, 1, 1, 0, 0]])
    mixed = replace(
        own,
        off_policy_NT=tensor([[False] * 5] * 7 + [[True] * 5]),
        behavior_logps_NT=logps_NT - torch.rand(8, 5, generator=generator),
    )
    plain, mixed_in = (
        loss_and_gradient(logps_NT, rows, kind=kind, aggregation=how, ratio="proximal") for rows in (own, mixed)
    )
    assert mixed_in[0] == plain[0]
    assert mixed_in[1].equal(plain[1])


def test_loss_terms_kl_and_entropy():
    logps_NT = tensor([[-1.0, -1.0], [-1.0, math.nan]], requires_grad=True)
    ref_NT = tensor([[-0.9, -1.0], [-1.1, math.nan]])
    entropies_NT = tensor([[1.0, 3.0], [0.5, math.nan]], requires_grad=True)
    rows = make_rows([0.0, 0.0], mask=[[1, 1], [1, 0]])
    loss, stats = make_loss(kl_coef=0.5, entropy_coef=0.1)(
        logps_NT,
        rows,
        divisors=divisors_of(rows),
        ref_logps_NT=ref_NT,
        entropies_NT=entropies_NT,
    )
    # k3(0.1) = 0.0051709, k3(0) = 0, k3(-0.1) = 0.0048374; entropy means 2 and 0.5
    kl = (0.0051709 / 2 + 0.0048374) / 2
    assert loss.item() == pytest.approx(0.5 * kl - 0.1 * (2.0 + 0.5) / 2, abs=1e-6)
    assert stats.metrics()["kl"] == pytest.approx((0.0051709 + 0.0048374) / 3, abs=1e-6)
    loss.backward()
    assert entropies_NT.grad.tolist() == [pytest.approx([-0.025, -0.025]), pytest.approx([-0.05, 0.0])]
    assert logps_NT.grad[1].tolist() == pytest.approx([0.5 * (1 - math.exp(-0.1)) / 2, 0.0], abs=1e-6)


def test_loss_terms_assert_their_columns():
    rows = make_rows([1.0], mask=[[1]])
    with pytest.raises(AssertionError, match="ref_logps_NT"):
        make_loss(kl_coef=0.1)(torch.zeros(1, 1), rows, divisors=divisors_of(rows))
    with pytest.raises(AssertionError, match="entropies_NT"):
        make_loss(entropy_coef=0.1)(torch.zeros(1, 1), rows, divisors=divisors_of(rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_ignores_padding_and_empty_rows(kind, mode):
    logps_NT = tensor([[-1.0, math.nan], [-math.inf, math.nan], [-2.0, -math.inf]])
    rows = make_rows([1.0, 1.0, -1.0], mask=[[1, 0], [0, 0], [1, 0]], behavior=logps_NT, is_off_policy=[1, 1, 0])
    loss, gradient_NT, stats = loss_and_gradient(logps_NT, rows, kind=kind, ratio=mode)
    # three rows, of one, no and one token: -(-A / 3) each; under cispo the loss is A * (1 * -1 - 1 * -2) / -3
    assert gradient_NT.tolist() == [pytest.approx([-1 / 3, 0]), [0.0, 0.0], pytest.approx([1 / 3, 0])]
    assert loss == pytest.approx(-1 / 3 if kind == "cispo" else 0.0)
    assert stats.metrics()["inject/tokens_with_gradient"] == 1.0


def test_clip_metrics_of_on_policy_and_off_policy_tokens():
    good, bad = [0.5, 1.0, 1.1, 1.5], [0.5, 1.0, 1.5, 9.0]
    logps_NT = tensor([good, bad, bad, good, bad]).log()
    anchor_NT = torch.zeros(5, 4)
    advantages, off_policy = [1.0, -1.0, 0.0, 1.0, 0.0], [0, 0, 0, 1, 1]
    rows = make_rows(advantages, mask=[[1] * 4] * 5, behavior=anchor_NT, old=anchor_NT, is_off_policy=off_policy)
    _, gradient_NT, stats = loss_and_gradient(logps_NT, rows, dual_clip=3.0)
    found = stats.metrics()
    # 12 on-policy tokens: 1.5 is too high in the good row, 0.5 too low and 9 over the dual clip in the bad one;
    # where A = 0 there is nothing to clip
    assert found["clip_ratio/low"] == 1 / 12
    assert found["clip_ratio/high"] == 2 / 12
    # 8 off-policy tokens: 1.5 is cut, and the row with A = 0 has no gradient
    assert found["inject/tokens_with_gradient"] == 3 / 8
    assert found["inject/ratio_mean"] == pytest.approx((0.5 + 1 + 1.1 + 1.5 + 0.5 + 1 + 1.5 + 9) / 8)
    assert (found["inject/ratio_min"], found["inject/ratio_max"]) == pytest.approx((0.5, 9.0))
    assert int((gradient_NT[3:] != 0).sum()) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", HOWS)
def test_off_policy_gradient_fraction_is_that_of_autograd(kind, mode, how):
    generator = torch.Generator().manual_seed(1)
    logps_NT = -torch.rand(6, 5, generator=generator)
    near_NT = logps_NT + 0.15 * torch.randn(6, 5, generator=generator)
    mask = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    rows = make_rows(
        [1.0, -1.0, 0.5, 2.0, -0.3, 0.1],
        mask=mask,
        behavior=near_NT,
        old=near_NT - 0.1,
        is_off_policy=[1, 0, 0, 1, 0, 1],
    )
    _, gradient_NT, stats = loss_and_gradient(logps_NT, rows, kind=kind, ratio=mode, aggregation=how)
    size_NT = gradient_NT.abs()
    expected = size_NT[rows.off_policy_NT].sum() / size_NT.sum()
    assert stats.metrics()["inject/gradient_l1_fraction"] == pytest.approx(expected.item(), rel=1e-5)
    if mode != "decoupled" or kind != "gspo":  # one ratio for the sequence spreads the token weights evenly
        assert stats.off_policy_tokens_with_gradient == float((gradient_NT[rows.off_policy_NT] != 0).sum())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_policy_loss_of_micro_batches_adds_up(data):
    num_rows, num_columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    kind, mode, how = (data.draw(st.sampled_from(choices)) for choices in (KINDS, MODES, HOWS))
    # wide enough for some of these sequences, whose log w lie between -1 and 1 nats per token
    engine = mismatch_settings(data.draw(st.sampled_from(list(MISMATCH_RULES))), geo_low=0.8, geo_high=1.25, k3_max=0.1)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logps_NT, behavior_NT, old_NT, ref_NT, entropies_NT = (
        -torch.rand(num_rows, num_columns, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    rows = LossInputs(
        behavior_logps_NT=behavior_NT,
        mask_NT=torch.rand(num_rows, num_columns, generator=generator) < 0.7,
        advantages_N=torch.randn(num_rows, generator=generator, dtype=torch.float64),
        off_policy_NT=torch.rand(num_rows, num_columns, generator=generator) < 0.4,
        old_logps_NT=old_NT if data.draw(st.booleans()) else None,
    )
    divisors = Divisors(num_sequences=num_rows, num_tokens=int(rows.mask_NT.sum()), max_tokens=7)
    loss_of = make_loss(
        kind=kind, ratio=mode, aggregation=how, dual_clip=1.5, kl_coef=0.1, entropy_coef=0.01, mismatch=engine
    )

    def part(chosen_N: Tensor) -> tuple[Tensor, LossStats]:
        columns = {each.name: getattr(rows, each.name) for each in fields(rows)}
        some = LossInputs(**{name: None if column is None else column[chosen_N] for name, column in columns.items()})
        more = {"ref_logps_NT": ref_NT[chosen_N], "entropies_NT": entropies_NT[chosen_N]}
        return loss_of(logps_NT[chosen_N], some, divisors=divisors, **more)

    whole_loss, whole_stats = part(torch.arange(num_rows))
    parts = [part(chosen_N) for chosen_N in torch.randperm(num_rows, generator=generator).split(2)]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole_loss.item(), abs=1e-12)
    summed = sum((stats for _, stats in parts), start=LossStats()).metrics()
    assert summed == pytest.approx(whole_stats.metrics(), abs=1e-9)


LOSS_NT = tensor([[1.0, 2.0, 3.0], [4.0, 100.0, math.nan]])
MASK_NT = tensor([[1, 1, 1], [1, 0, 0]])
WHOLE_BATCH = Divisors(num_sequences=2, num_tokens=4, max_tokens=10)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("seq_mean_token_mean", (6 / 3 + 4 / 1) / 2),
        ("token_mean", (6 + 4) / 4),
        ("seq_mean_token_sum_norm", (6 + 4) / 10 / 2),
    ],
)
def test_aggregation(how, expected):
    assert aggregate(LOSS_NT, MASK_NT, how=how, divisors=WHOLE_BATCH).item() == pytest.approx(expected)


@pytest.mark.parametrize("how", ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"])
def test_aggregation_of_an_empty_row_is_zero(how):
    empty = tensor([[0, 0, 0], [0, 0, 0]])
    assert aggregate(LOSS_NT, empty, how=how, divisors=WHOLE_BATCH).item() == 0.0
    nothing = Divisors(num_sequences=2, num_tokens=0, max_tokens=10)
    assert aggregate(LOSS_NT, empty, how=how, divisors=nothing).item() == 0.0


def test_loss_term_of_another_module_enters_the_loss(monkeypatch):
    # an SFT term on off-policy tokens: -log pi, coefficient 0.5
    sft = LossTerm(
        coefficient=lambda settings: 0.5,
        per_token=lambda tokens: torch.where(tokens.off_policy_NT, -tokens.logps_NT, 0.0),
    )
    monkeypatch.setitem(LOSS_TERMS, "sft", sft)
    logps_NT = tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    rows = make_rows([0.0, 0.0], mask=[[1, 1], [1, 1]], is_off_policy=[0, 1])
    loss, _ = make_loss()(logps_NT, rows, divisors=divisors_of(rows))
    # mean over 2 rows of the mean over 2 tokens
    assert loss.item() == pytest.approx(0.5 * (3 + 4) / 2 / 2)
    loss.backward()
    assert logps_NT.grad.tolist() == [[0.0, 0.0], [-0.125, -0.125]]
