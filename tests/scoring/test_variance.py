import itertools
import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.config.guides import InjectSettings
from npo_cli.scoring.variance import (
    LARGEST_LOG,
    VARIANCE_ESTIMATORS,
    KLFloor,
    compute_moments,
    estimate_kl_floor,
    estimate_variance,
    k1,
    k2,
    k3,
    log_sum_exp,
    log_variances,
    net_kl,
    pool_moments,
)
from tests.scoring.samples import CAP, formula, make_drifted_ratio, make_ratio

# A chain of three bits: (chance of 1 first, chance of 1 after 0, chance of 1 after 1), in quarters.
LEARNER, GUIDE = (2, 1, 3), (1, 2, 3)
CHAIN = tuple(itertools.product((0, 1), repeat=3))


def token_chances(policy, bits):
    """Chance of each bit given the one before, in quarters."""
    ones = [policy[0], *(policy[1 + bit] for bit in bits[:-1])]
    return [one if bit else 4 - one for one, bit in zip(ones, bits, strict=True)]


def chain_sample(bits):
    return make_ratio(np.log(np.array(token_chances(LEARNER, bits)) / np.array(token_chances(GUIDE, bits))))


def enumerated(policy):
    """The law of `policy` as 4^3 equally likely samples, so a plain mean over them is an exact expectation."""
    return [chain_sample(bits) for bits in CHAIN for _ in range(math.prod(token_chances(policy, bits)))]


def chance(policy, bits):
    return math.prod(token_chances(policy, bits)) / 64


def test_variance_second_moment_under_the_guide_is_the_first_under_the_learner():
    exact = sum(chance(LEARNER, bits) ** 2 / chance(GUIDE, bits) for bits in CHAIN)
    from_guide = estimate_variance(enumerated(GUIDE), formula("seq2", weight_cap=math.inf))
    from_learner = np.mean([math.exp(sample.log_w) for sample in enumerated(LEARNER)])
    assert from_guide == pytest.approx(exact)
    assert from_learner == pytest.approx(exact)
    assert exact > 1.2


def test_group_variance_is_capped_by_the_clip_of_what_is_trained():
    far = [make_drifted_ratio(-5.0, 10)]  # exp(2 x 5) = 22 026, beyond every cap
    cases = {
        # clip 0.2: (7 + 1.2^2)/8; without the clip C = 10; two slots; two more rows; the cap of decoupled
        (("ratio", "exact"),): (7 + 1.44) / 8,
        (("ratio", "exact"), ("clip_off_policy", False)): (7 + 100) / 8,
        (("ratio", "exact"), ("slots", 2)): (6 + 2 * 1.44) / 8,
        (("ratio", "exact"), ("slots", 2), ("mode", "append")): (8 + 2 * 1.44) / 10,
        (("ratio", "decoupled"), ("decoupled_cap", 2.0)): (7 + 4) / 8,
        (("ratio", "proximal"),): (7 + 100) / 8,
    }
    for inject, expected in cases.items():
        trained = replace(formula("group2"), inject=InjectSettings(**dict(inject)))
        assert estimate_variance(far, trained) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "is_weighted"),
    [("exact", True), ("decoupled", True), ("proximal", False), ("unit", False), ("none", False)],
)
def test_variance_is_a_distance_where_injected_responses_have_no_weight(ratio, is_weighted):
    assert replace(formula(), inject=InjectSettings(ratio=ratio)).is_weighted == is_weighted


def test_variance_moments_agree_when_sampled():
    rng = np.random.default_rng(7)
    guide, learner = enumerated(GUIDE), enumerated(LEARNER)
    from_guide = [guide[i] for i in rng.integers(64, size=20000)]
    from_learner = np.exp([learner[i].log_w for i in rng.integers(64, size=20000)])
    gap = estimate_variance(from_guide, formula("seq2", weight_cap=math.inf)) - from_learner.mean()
    squares = np.exp([2 * sample.log_w for sample in from_guide])
    error = math.hypot(squares.std() / math.sqrt(20000), from_learner.std() / math.sqrt(20000))
    assert abs(gap) < 3 * error


def test_on_the_enumerated_chain_weights_average_to_one_and_ess_equals_seq2():
    samples = enumerated(GUIDE)
    assert np.mean([math.exp(sample.log_w) for sample in samples]) == pytest.approx(1.0)
    # with E[w] = 1, N sum w^2/(sum w)^2 is the plain second moment
    assert estimate_variance(samples, formula("ess")) == pytest.approx(
        estimate_variance(samples, formula("seq2", weight_cap=math.inf))
    )


def test_exact_kl_of_the_chain():
    exact = sum(chance(GUIDE, bits) * math.log(chance(GUIDE, bits) / chance(LEARNER, bits)) for bits in CHAIN)
    samples = enumerated(GUIDE)
    assert estimate_variance(samples, formula("seq2_lognormal")) == pytest.approx(math.exp(2 * exact))
    assert estimate_variance(samples, formula("kl_exp")) == pytest.approx(math.exp(exact / 3))


@pytest.mark.parametrize("kind", VARIANCE_ESTIMATORS)
@pytest.mark.parametrize("average", ["sequence", "token"])
def test_variance_of_the_learner_itself_is_one(kind, average):
    same = [make_drifted_ratio(0.0, length, prompt_id=str(length)) for length in (1, 3, 17)]
    assert all(sample.sum_rho2 == sample.num_tokens for sample in same)  # rho = 1 at each token
    assert estimate_variance(same, formula(kind, kl_average=average)) == pytest.approx(1.0, abs=1e-12)


def normal_drift(kl: float, num_tokens: int = 10):
    """401 samples, equally likely: log w normal with mean -kl and variance 2 kl, token by token, so that E[w] = 1."""
    grid = NormalDist().inv_cdf
    z_N = [grid((i + 0.5) / 401) for i in range(401)]
    return [make_drifted_ratio(math.sqrt(2 * kl) * z - kl, num_tokens) for z in z_N]


@pytest.mark.parametrize("kind", ["kl_exp", "seq2_lognormal", "ess", "group2"])
def test_variance_grows_with_the_drift(kind):
    values = [estimate_variance(normal_drift(kl), formula(kind)) for kl in (0.0, 0.05, 0.2, 0.8, 2.0)]
    assert values[0] == pytest.approx(1.0, abs=1e-9)
    assert all(far > near for near, far in itertools.pairwise(values))


@pytest.mark.parametrize("kind", ["tok2", "tok2_grad"])
def test_token_variance_grows_with_independent_token_drift(kind):
    z = [NormalDist().inv_cdf((i + 0.5) / 200) for i in range(200)]
    values = [
        estimate_variance([make_ratio([s * x - s * s / 2 for x in z])], formula(kind)) for s in (0.0, 0.1, 0.3, 0.6)
    ]
    # rho is lognormal with mean 1: E[rho^2] = exp(s^2)
    assert values == pytest.approx([math.exp(s * s) for s in (0.0, 0.1, 0.3, 0.6)], rel=0.02)


def test_truncated_sequence_moment_falls_again_far_away():
    near, middle, far = (estimate_variance(normal_drift(kl), formula("seq2")) for kl in (0.05, 1.0, 12.0))
    assert near < middle
    assert far < 1 < middle


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(500, (7 + math.e) / 8), (1000, (7 + math.e**2) / 8), (4000, (7 + 100) / 8)]
)
def test_group_variance_at_one_millinat_per_token(num_tokens, expected):
    # KL per sequence 0.5, 1, 4: the slot's moment is e, e^2, and e^8 cut to C^2 = 100
    samples = [make_drifted_ratio(-1e-3 * num_tokens, num_tokens)] * 4
    assert estimate_variance(samples, formula("group2")) == pytest.approx(expected)
    assert expected == pytest.approx({500: 1.215, 1000: 1.799, 4000: 13.375}[num_tokens], abs=5e-4)


def test_ess_of_one_heavy_weight_in_four():
    # w = 1, 1, 1, 5: ESS = 64/28 = 2.285714, so V = 4/ESS = 1.75 = 1 + CV^2
    samples = [make_drifted_ratio(math.log(w), 5) for w in (1, 1, 1, 5)]
    assert estimate_variance(samples, formula("ess")) == pytest.approx(1.75)
    assert 4 / estimate_variance(samples, formula("ess")) == pytest.approx(2.285714, abs=1e-6)


def test_three_estimates_of_kl_from_one_sample():
    assert k1(0.1) == -0.1
    assert k2(0.1) == pytest.approx(0.005)
    assert k3(0.1) == pytest.approx(0.0051709, abs=1e-7)


def test_k1_and_k3_average_to_the_same_kl():
    log_w = np.array([sample.log_w for sample in enumerated(GUIDE)])
    assert k1(log_w).mean() == pytest.approx(k3(log_w).mean())
    assert (k3(log_w) >= 0).all()


def test_kappa_scales_the_exponent_of_the_token_kl():
    samples = [make_drifted_ratio(-2.0, 10)]  # 0.2 nats per token
    assert estimate_variance(samples, formula("kl_exp", kl_scale=5.0)) == pytest.approx(math.e)


def test_averages_weigh_responses_or_tokens_alike():
    samples = [make_drifted_ratio(-1.0, 1), make_drifted_ratio(0.0, 9)]
    # by sequence (1/1 + 0/9)/2 = 1/2; by token 1/10
    by_sequence = estimate_variance(samples, formula("kl_exp", kl_average="sequence"))
    by_token = estimate_variance(samples, formula("kl_exp", kl_average="token"))
    assert (by_sequence, by_token) == (pytest.approx(math.exp(0.5)), pytest.approx(math.exp(0.1)))


def test_token_moments_by_hand():
    # rho = 2, 1 and 1/2: squares 4, 1 and 1/4
    samples = [make_ratio([math.log(2), 0.0]), make_ratio([math.log(0.5)])]
    assert estimate_variance(samples, formula("tok2", kl_average="sequence")) == pytest.approx((5 / 2 + 1 / 4) / 2)
    assert estimate_variance(samples, formula("tok2", kl_average="token")) == pytest.approx(5.25 / 3)
    assert estimate_variance(samples, formula("tok2_grad")) == pytest.approx(5.25 / 3.5)


def test_tokens_without_gradient_do_not_count():
    # only the first token moves the policy: rho^2 G/rho G = 4/2
    samples = [make_ratio([math.log(2), math.log(9)], grads_T=[1.0, 0.0])]
    assert estimate_variance(samples, formula("tok2_grad")) == pytest.approx(2.0)
    assert estimate_variance([make_ratio([0.3], grads_T=[0.0])], formula("tok2_grad")) == 1.0


def test_variance_kl_floor_is_subtracted_down_to_zero():
    floor = KLFloor(per_token=0.05, per_sequence=0.5)
    samples = [make_drifted_ratio(-1.0, 10)]  # 0.1 per token, 1 per sequence
    assert estimate_variance(samples, formula("kl_exp"), floor=floor) == pytest.approx(math.exp(0.05))
    assert estimate_variance(samples, formula("seq2_lognormal"), floor=floor) == pytest.approx(math.exp(1.0))
    assert estimate_variance(samples, formula("group2"), floor=floor) == pytest.approx((7 + math.e) / 8)
    deep = KLFloor(per_token=1.0, per_sequence=10.0)
    assert estimate_variance(samples, formula("group2"), floor=deep) == 1.0


def test_variance_kl_floor_is_that_of_the_learner_itself():
    moments = pool_moments(
        compute_moments([make_drifted_ratio(-0.2, 4), make_drifted_ratio(-0.4, 4)], ["p"], cap=10.0), np.ones((1, 1))
    )
    floor = estimate_kl_floor(moments, "sequence")
    assert (floor.per_token[0], floor.per_sequence[0]) == pytest.approx((0.075, 0.3))
    per_token, per_sequence = net_kl(moments, floor, "sequence")
    assert (per_token[0], per_sequence[0]) == (0.0, 0.0)


def test_enormous_drifts_stay_finite():
    samples = [make_drifted_ratio(-4000.0, 4000), make_drifted_ratio(-9000.0, 4000)]
    for kind in VARIANCE_ESTIMATORS:
        assert math.isfinite(estimate_variance(samples, formula(kind)))
    assert estimate_variance(samples, formula("seq2_lognormal")) == pytest.approx(math.exp(LARGEST_LOG))
    # one weight holds everything: V = N
    assert estimate_variance(samples, formula("ess")) == pytest.approx(2.0)


def test_variance_without_samples_is_absent():
    assert math.isnan(estimate_variance([], formula("group2")))


@given(
    st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any), st.lists(st.floats(-3, 3), min_size=9, max_size=9)
)
def test_counting_a_prompt_twice_is_repeating_its_samples(counts, log_ws):
    samples = [make_drifted_ratio(log_w, 2 + i, prompt_id=str(i % 3)) for i, log_w in enumerate(log_ws)]
    repeated = [sample for sample in samples for _ in range(counts[int(sample.prompt_id)])]
    moments = pool_moments(compute_moments(samples, ["0", "1", "2"], cap=CAP), np.array([counts], dtype=float))
    for kind in VARIANCE_ESTIMATORS:
        log_V = log_variances(moments, formula(kind))
        assert math.exp(log_V[0]) == pytest.approx(estimate_variance(repeated, formula(kind)))


def test_log_sums_survive_underflow_and_emptiness():
    assert log_sum_exp(np.array([-1000.0, -1000.0]), axis=0) == pytest.approx(-1000 + math.log(2))
    assert log_sum_exp(np.array([-np.inf, -np.inf]), axis=0) == -np.inf
