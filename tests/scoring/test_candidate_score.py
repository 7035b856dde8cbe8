import math
from dataclasses import replace

import pytest

from npo_cli.scoring.quality import wilson
from npo_cli.scoring.ranking import rank_candidates
from tests.scoring.samples import SIGNAL, make_candidate

LEARNER = make_candidate(0, [1, 0, 0, 0, 0, 0, 0, 0])


def test_a_line_of_the_ranking_by_hand():
    # 8 prompts x 4 samples, 4 prompts solved once: pass@4 = 4/8, pass@1 = 4/32
    guide = make_candidate(20, [1, 1, 1, 1, 0, 0, 0, 0], log_w=-1.0, num_tokens=10)
    (score,) = rank_candidates(LEARNER, [guide], SIGNAL)
    assert (score.quality, score.pass_at_k, score.pass_at_1) == (0.5, 0.5, 0.125)
    assert (score.quality_self, score.quality_net) == (0.125, 0.375)
    assert (score.kl_per_token, score.kl_per_sequence) == (pytest.approx(0.1), pytest.approx(1.0))
    # one slot of 8 with moment e^2; Q~ = 4.5/9
    assert score.variance == pytest.approx((7 + math.e**2) / 8)
    assert score.signal == pytest.approx(0.5 / ((7 + math.e**2) / 8))
    assert (score.num_prompts, score.num_samples, score.mean_length) == (8, 32, 10.0)
    assert score.ess_fraction == pytest.approx(1.0)
    assert (score.step, score.distance, score.quality_kind, score.variance_kind) == (20, 20, "pass@k", "group2")
    assert score.p_best == 1.0 and score.is_selected and not score.is_unreliable


def test_every_other_variance_is_reported_beside_the_chosen_one():
    (score,) = rank_candidates(LEARNER, [make_candidate(20, [1] * 8, log_w=-1.0)], SIGNAL)
    assert set(score.variances) == {"kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess"}
    assert score.variances["kl_exp"] == pytest.approx(math.exp(0.1))
    assert score.variances["tok2"] == pytest.approx(math.exp(-0.2))
    assert score.variances["seq2_lognormal"] == pytest.approx(math.exp(2.0))


def test_quality_pass_at_one_enters_the_signal_when_asked():
    knobs = replace(SIGNAL, quality="pass@1")
    (score,) = rank_candidates(LEARNER, [make_candidate(20, [2] * 8)], knobs)
    assert (score.quality, score.pass_at_1, score.pass_at_k) == (0.5, 0.5, 1.0)
    assert score.quality_self == 1 / 32
    assert score.signal == pytest.approx((8 * 0.5 + 0.5) / 9)


def test_the_learners_own_mismatch_is_taken_off():
    noisy = make_candidate(0, [0] * 8, log_w=-0.4, num_tokens=10)
    (score,) = rank_candidates(noisy, [make_candidate(20, [1] * 8, log_w=-1.4, num_tokens=10)], SIGNAL)
    assert score.kl_per_sequence == pytest.approx(1.0)
    assert score.kl_per_token == pytest.approx(0.1)
    assert score.variance == pytest.approx((7 + math.e**2) / 8)


def test_the_learner_is_compared_on_the_candidates_own_prompts():
    # the learner solves p00 only; the candidate was asked two prompts
    (score,) = rank_candidates(LEARNER, [make_candidate(20, [4, 4])], SIGNAL)
    assert (score.quality_self, score.quality_net) == (0.5, 0.5)


def test_a_guide_that_solves_nothing_has_a_finite_signal_and_a_wide_interval():
    (score,) = rank_candidates(LEARNER, [make_candidate(20, [0] * 8)], SIGNAL)
    assert score.quality == 0.0
    assert (score.quality_low, score.quality_high) == wilson(0, 8)
    assert score.signal == pytest.approx(0.5 / 9)


def test_kl_is_measured_on_all_samples_even_where_variance_is_on_the_correct_ones():
    guide = make_candidate(20, [2] * 16)
    ratios = tuple(replace(sample, log_w=-2.0 if sample.is_correct else 0.0) for sample in guide.ratios)
    (score,) = rank_candidates(make_candidate(0, [0] * 16), [replace(guide, ratios=ratios)], SIGNAL)
    assert score.kl_per_sequence == pytest.approx(1.0)
    assert score.variances["seq2_lognormal"] == pytest.approx(math.exp(4.0))


def test_few_samples_behind_variance_are_unreliable():
    (few,) = rank_candidates(LEARNER, [make_candidate(20, [1] * 7)], SIGNAL)  # 28 samples
    (enough,) = rank_candidates(LEARNER, [make_candidate(20, [1] * 8)], SIGNAL)  # 32
    assert few.is_unreliable and not enough.is_unreliable


def test_a_guide_never_seen_by_the_learner_has_no_variances_to_report():
    (score,) = rank_candidates(LEARNER, [replace(make_candidate(20, [1] * 8), ratios=())], SIGNAL)
    assert (score.variance, score.variances, score.is_unreliable) == (1.0, {}, True)
    assert (score.mean_length, score.kl_per_token, score.ess_fraction) == (0.0, 0.0, 0.0)
