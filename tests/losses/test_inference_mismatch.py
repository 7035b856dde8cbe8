"""w = trainer / engine of the same weights, by hand. N rows, T tokens."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from npo_cli.losses.inference_mismatch import MISMATCH_RULES, MismatchCorrection, correct_mismatch
from npo_cli.losses.types import LossInputs, LossStats
from tests.losses.builders import divisors_of, make_loss, make_rows, mismatch_settings

ALL = list(MISMATCH_RULES)
KINDS = ["grpo", "gspo", "gspo_token", "cispo"]
HOWS = ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"]

# three on-policy rows, the last token of the second one padding
WEIGHTS = [[0.4, 1.0, 3.0], [1.0005, 0.9996, 1.0], [6.0, 1.5, 1.0]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 0]]


def rows_with(weights: list[list[float]], *, mask: list[list[int]] | None = None, off_policy: list[int] | None = None):
    """Rows of A = 1 that the trainer finds as likely as the engine, times the weights; and the trainer's log-probs."""
    logps_NT = torch.full((len(weights), len(weights[0])), -1.0, dtype=torch.float64)
    behavior_NT = logps_NT - tensor(weights, dtype=torch.float64).log()
    whole = [[1] * len(row) for row in weights]
    return make_rows([1.0] * len(weights), mask=mask or whole, behavior=behavior_NT, is_off_policy=off_policy), logps_NT


def corrected(
    weights: list[list[float]], mode: str, *, mask: list[list[int]] | None = None, **bounds
) -> MismatchCorrection:
    rows, logps_NT = rows_with(weights, mask=mask)
    old_NT, behavior_NT = (
        torch.where(rows.mask_NT, column_NT, 0.0) for column_NT in (logps_NT, rows.behavior_logps_NT)
    )
    return correct_mismatch(old_NT, behavior_NT, rows.mask_NT, mismatch_settings(mode, **bounds))


def learned(logps_NT: Tensor, rows: LossInputs, mode: str, **changes: object) -> tuple[Tensor, Tensor, LossStats]:
    leaf_NT = logps_NT.clone().requires_grad_()
    chosen = {"mismatch": mismatch_settings(mode)} | changes
    loss, stats = make_loss(**chosen)(leaf_NT, rows, divisors=divisors_of(rows))
    (gradient_NT,) = torch.autograd.grad(loss, leaf_NT)
    return loss.detach(), gradient_NT, stats


# What each mode makes of the same rows

PRODUCTS = [0.4 * 1 * 3, 1.0005 * 0.9996, 6 * 1.5]
GOLDEN = {
    # 3 and 6 are cut at C = 2
    "token_tis": [[0.4, 1.0, 2.0], [1.0005, 0.9996, 1.0], [2.0, 1.5, 1.0]],
    # products 1.2, 1.0001 and 9, the last cut at 2
    "sequence_tis": [[1.2] * 3, [PRODUCTS[1]] * 2 + [1.0], [2.0, 2.0, 1.0]],
    # 0.4 < 0.5 and 6 > 5
    "token_mis": [[0.0, 1.0, 3.0], [1.0005, 0.9996, 1.0], [0.0, 1.5, 1.0]],
    # 9 > 5
    "sequence_mis": [[1.2] * 3, [PRODUCTS[1]] * 2 + [1.0], [0.0, 0.0, 1.0]],
    # geometric means 1.2^(1/3) = 1.063, 1.00005 and 3
    "geometric": [[0.0] * 3, [1.0] * 3, [0.0, 0.0, 1.0]],
    # means of w - 1 - log w: (0.316 + 0 + 0.901) / 3 = 0.406, 1e-7 and (3.208 + 0.095) / 2 = 1.651
    "k3": [[0.0] * 3, [1.0] * 3, [0.0, 0.0, 1.0]],
    "off": [[1.0] * 3] * 3,
}


@pytest.mark.parametrize("mode", GOLDEN)
def test_mismatch_factor_per_token(mode):
    found = corrected(WEIGHTS, mode, mask=MASK)
    assert found.weight_NT.tolist() == [pytest.approx(row, abs=1e-9) for row in GOLDEN[mode]]


@pytest.mark.parametrize(
    ("mode", "tokens", "kept"),
    [
        *(("token_tis", 2, 3), ("sequence_tis", 2, 3), ("token_mis", 2, 3), ("sequence_mis", 2, 2)),
        *(("geometric", 5, 1), ("k3", 5, 1), ("off", 0, 3)),
    ],
)
def test_mismatch_metrics_count_clipped_tokens_and_kept_sequences(mode, tokens, kept):
    rows, logps_NT = rows_with(WEIGHTS, mask=MASK)
    found = learned(logps_NT, rows, mode)[2].metrics()
    # 7 tokens of 3 sequences
    assert found["mismatch/clipped_fraction"] == tokens / 7
    assert found["mismatch/kept_fraction"] == kept / 3
    # w itself is measured, whatever the mode makes of it
    assert found["mismatch/weight_max"] == pytest.approx(6.0)
    assert found["mismatch/weight_mean"] == pytest.approx((0.4 + 1 + 3 + 1.0005 + 0.9996 + 6 + 1.5) / 7)


def test_mismatch_filters_use_their_bounds():
    assert corrected(WEIGHTS, "geometric", geo_high=1.07, mask=MASK).weight_NT[:, 0].tolist() == [1.0, 1.0, 0.0]
    assert corrected(WEIGHTS, "geometric", geo_low=0.5, geo_high=3.1, mask=MASK).weight_NT[:, 0].tolist() == [1.0] * 3
    assert corrected(WEIGHTS, "k3", k3_max=0.41, mask=MASK).weight_NT[:, 0].tolist() == [1.0, 1.0, 0.0]
    assert corrected(WEIGHTS, "k3", k3_max=0.40, mask=MASK).weight_NT[:, 0].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("mode", "bound", "outward"),
    [
        *(("token_mis", "low", 9.0), ("token_mis", "high", 0.0)),
        *(("sequence_mis", "low", 9.0), ("sequence_mis", "high", 0.0)),
        *(("geometric", "geo_low", 9.0), ("geometric", "geo_high", 0.0), ("k3", "k3_max", 0.0)),
        *(("token_tis", "cap", 0.0), ("sequence_tis", "cap", 0.0)),
    ],
)
def test_mismatch_bounds_are_inclusive(mode, bound, outward):
    # one token, so that token, product and geometric mean are the same w
    weight = 0.7 if bound in ("low", "geo_low") else 1.5
    log_weight = corrected([[weight]], "off").log_weight_NT
    exact = (log_weight.expm1() - log_weight if mode == "k3" else log_weight.exp()).item()
    assert not corrected([[weight]], mode, **{bound: exact}).clipped_NT.item()
    assert corrected([[weight]], mode, **{bound: math.nextafter(exact, outward)}).clipped_NT.item()


def test_mismatch_sequence_weight_is_clamped_at_20_nats():
    # -7 and +7 nats per token, four tokens: e^-28 and e^28 without the clamp
    weights = [[math.exp(-7)] * 4, [math.exp(7)] * 4]
    found = corrected(weights, "sequence_tis", cap=1e9)
    assert found.weight_NT[:, 0].tolist() == pytest.approx([math.exp(-20), math.exp(20)], rel=1e-9)
    # and one token of 50 nats is one of 20
    assert corrected([[math.exp(-50)]], "token_tis").weight_NT.item() == pytest.approx(math.exp(-20), rel=1e-9)
    assert corrected(weights, "sequence_mis").weight_NT.eq(0).all()


def test_mismatch_sequence_weight_vanishes_with_length():
    # an engine 0.01 nats per token too sure of itself: e^-0.1 over 10 tokens, e^-10 over 1000
    short, long = ([[math.exp(-0.01)] * length] for length in (10, 1000))
    assert corrected(short, "sequence_tis").weight_NT[0, 0].item() == pytest.approx(math.exp(-0.1))
    assert corrected(long, "sequence_tis").weight_NT[0, 0].item() == pytest.approx(4.54e-5, rel=1e-3)
    assert corrected(long, "token_tis").weight_NT[0, 0].item() == pytest.approx(0.99005)
    assert corrected(long, "sequence_mis").clipped_NT.all()


def test_mismatch_noise_cancels_in_the_product_not_in_k3():
    even = [[math.exp(0.2), math.exp(-0.2)] * 3]
    assert corrected(even, "sequence_tis").weight_NT[0].tolist() == pytest.approx([1.0] * 6)
    assert not corrected(even, "geometric").clipped_NT.any()
    # mean of w - 1 - log w = cosh(0.2) - 1 = 0.0200668
    assert corrected(even, "k3").clipped_NT.all()
    assert not corrected(even, "k3", k3_max=0.0201).clipped_NT.any()


@pytest.mark.parametrize("mode", ALL)
def test_mismatch_does_not_read_padding(mode):
    # log w = 0.2: a geometric mean of 1.22 and k3 = 0.0214; over three tokens they would be 1.07 and 0.007
    padded = corrected([[math.exp(0.2), math.nan, math.nan]], mode, mask=[[1, 0, 0]], geo_high=1.1)
    alone = corrected([[math.exp(0.2)]], mode, geo_high=1.1)
    assert padded.weight_NT[0, 0].equal(alone.weight_NT[0, 0])
    assert padded.weight_NT[0, 1:].tolist() == [1.0, 1.0]
    assert padded.clipped_NT.tolist() == [[mode in ("geometric", "k3"), False, False]]


# What it does to the loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("several_updates", [False, True])
def test_mismatch_correction_of_a_matching_engine_is_plain_grpo(kind, mode, several_updates):
    generator = torch.Generator().manual_seed(0)
    logps_NT = -torch.rand(3, 4, generator=generator)
    old_NT = logps_NT + 0.3 * torch.randn(3, 4, generator=generator) if several_updates else None
    mask = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    sampled_NT = logps_NT if old_NT is None else old_NT
    rows = make_rows([1.0, -0.5, 2.0], mask=mask, behavior=sampled_NT, old=old_NT)
    loss, gradient_NT, stats = learned(logps_NT, rows, mode, kind=kind)
    plain_loss, plain_gradient_NT, _ = learned(logps_NT, rows, "off", kind=kind)
    assert loss.equal(plain_loss)
    assert gradient_NT.equal(plain_gradient_NT)
    found = stats.metrics()
    agreement = {"weight_mean": 1, "weight_max": 1, "clipped_fraction": 0, "ess": 1, "k1": 0, "k3": 0, "chi2": 0}
    assert {name: found[f"mismatch/{name}"] for name in agreement} == agreement
    # the row without tokens is no sequence
    assert (found["mismatch/abs_log_w_p99"], found["mismatch/kept_fraction"]) == (0.0, 1.0)


def test_mismatch_weight_is_a_constant_factor_on_the_clipped_loss():
    # rho = 1.5 is clipped at 1.2, rho = 1.1 is not; the engine is half as sure as the old policy: w = 2, cut at 1.5
    logps_NT = tensor([[1.5, 1.1]]).log()
    rows = make_rows([1.0], mask=[[1, 1]], behavior=tensor([[0.5, 0.5]]).log(), old=torch.zeros(1, 2))
    loss, gradient_NT, stats = learned(logps_NT, rows, "token_tis", mismatch=mismatch_settings("token_tis", cap=1.5))
    assert loss.item() == pytest.approx(-1.5 * (1.2 + 1.1) / 2)
    # no gradient through w, which would add to that of rho
    assert gradient_NT[0].tolist() == pytest.approx([0.0, -1.5 * 1.1 / 2])
    assert stats.gradient_magnitude == pytest.approx(1.5 * 1.1 / 2)


def test_mismatch_does_not_weight_loss_terms():
    logps_NT = tensor([[-1.0, -1.0]], requires_grad=True)
    rows = make_rows([1.0], mask=[[1, 1]], behavior=logps_NT.detach() + 3)
    more = {"ref_logps_NT": logps_NT.detach() + 0.1, "entropies_NT": torch.full((1, 2), 2.0)}
    chosen = make_loss(kl_coef=1.0, entropy_coef=0.5, mismatch=mismatch_settings("token_mis"))
    loss, _ = chosen(logps_NT, rows, divisors=divisors_of(rows), **more)
    # w = e^-3 < 0.5 leaves no policy loss: k3 of 0.1 nats less half an entropy of 2
    assert loss.item() == pytest.approx(0.0051709 - 1.0, abs=1e-6)


@pytest.mark.parametrize("ratio", ["exact", "proximal", "decoupled", "none"])
@pytest.mark.parametrize("mode", ALL)
def test_mismatch_does_not_affect_off_policy_rows(mode, ratio):
    # two answers of 20 tokens, each 20 nats likelier to the one that wrote it than to the trainer
    rows, logps_NT = rows_with([[math.exp(-1)] * 20] * 2, off_policy=[0, 1])
    _, gradient_NT, stats = learned(logps_NT, rows, mode, ratio=ratio)
    # of the guide's: -1 / (2 rows * 20 tokens), under exact and decoupled times pi / g = e^-1, with no cut
    full = -1 / 40 * (math.exp(-1) if ratio in ("exact", "decoupled") else 1.0)
    assert gradient_NT[1].tolist() == pytest.approx([full] * 20)
    assert gradient_NT[1].equal(learned(logps_NT, rows, "off", ratio=ratio)[1][1])
    # of its own: w = e^-1 = 0.37 a token, e^-20 in all, a geometric mean of 0.37, k3 of e^-1 - 1 + 1
    own = {"token_tis": math.exp(-1), "sequence_tis": math.exp(-20), "off": 1.0}.get(mode, 0.0)
    assert gradient_NT[0].tolist() == pytest.approx([-own / 40] * 20, rel=1e-9)
    found = stats.metrics()
    assert found["inject/tokens_with_gradient"] == 1.0
    assert found["mismatch/kept_fraction"] == float(own > 0)
    assert found["mismatch/k1"] == pytest.approx(1.0)


def test_mismatch_metrics_are_absent_without_on_policy_tokens():
    rows, logps_NT = rows_with([[math.exp(-1)] * 3], off_policy=[1])
    assert not any(name.startswith("mismatch/") for name in learned(logps_NT, rows, "token_tis")[2].metrics())


def kept_by_hand(logs: list[float], mode: str) -> bool:
    """Whether a sequence with these log w passes, in plain arithmetic."""
    mean = sum(logs) / len(logs)
    k3 = sum(math.exp(log) - 1 - log for log in logs) / len(logs)
    product = math.exp(sum(logs))
    return {"sequence_mis": 0.5 <= product <= 5, "geometric": 0.8 <= math.exp(mean) <= 1.25, "k3": k3 <= 0.1}[mode]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_mismatch_dropped_sequence_counts_in_the_divisors(data):
    num_rows, num_columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    mode = data.draw(st.sampled_from(["sequence_mis", "geometric", "k3"]))
    kind, how = (data.draw(st.sampled_from(choices)) for choices in (KINDS, HOWS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logps_NT, behavior_NT = (-torch.rand(num_rows, num_columns, generator=generator).double() for _ in range(2))
    rows = LossInputs(
        behavior_logps_NT=behavior_NT,
        mask_NT=torch.ones(num_rows, num_columns, dtype=torch.bool),
        advantages_N=torch.randn(num_rows, generator=generator).double(),
        off_policy_NT=(torch.rand(num_rows, 1, generator=generator) < 0.3).expand(num_rows, num_columns),
    )
    chosen = make_loss(
        kind=kind, aggregation=how, mismatch=mismatch_settings(mode, geo_low=0.8, geo_high=1.25, k3_max=0.1)
    )
    whole, stats = chosen(logps_NT, rows, divisors=divisors_of(rows))

    log_weights_NT = (logps_NT - behavior_NT).tolist()
    is_off_policy_N = rows.off_policy_NT[:, 0]
    pairs = zip(is_off_policy_N.tolist(), log_weights_NT, strict=True)
    kept_N = tensor([is_off_policy or kept_by_hand(logs, mode) for is_off_policy, logs in pairs])
    left = {each.name: getattr(rows, each.name) for each in fields(rows)}
    left = LossInputs(**{name: None if column is None else column[kept_N] for name, column in left.items()})
    rest, _ = chosen(logps_NT[kept_N], left, divisors=divisors_of(rows)) if kept_N.any() else (0, 0)
    assert whole.item() == pytest.approx(float(rest), abs=1e-12)
    assert stats.mismatch.unmasked_sequences == int((kept_N & ~is_off_policy_N).sum())
