import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_cli.errors import NpoError
from npo_cli.scoring.quality import PromptPassCount, wilson
from npo_cli.scoring.ranking import (
    NO_LOGPROBS_NOTE,
    RECORDED_NOTE,
    build_candidates,
    list_sampled_prompts,
    mean_quality,
    quality_k,
    variance_range_warning,
)
from tests.scoring.samples import FORMULA, formula, make_candidate, make_drifted_ratio, rank

LEARNER = make_candidate(0, [0] * 30)


def chosen_step(scores):
    (step,) = [score.step for score in scores if score.is_selected]
    return step


def test_ranking_selects_a_clearly_better_guide():
    # Q .2, .8, .9 of 30 prompts; group2 V 1, 1.21, 13.4: S about .21, .65, .07
    candidates = [
        make_candidate(20, [1] * 6 + [0] * 24),
        make_candidate(40, [1] * 24 + [0] * 6, log_w=-0.5),
        make_candidate(80, [1] * 27 + [0] * 3, log_w=-4.0),
    ]
    scores = rank(LEARNER, candidates)
    assert chosen_step(scores) == 40
    assert scores[1].p_best > 0.95
    assert sum(score.p_best for score in scores) == pytest.approx(1.0)
    assert [score.step for score in scores] == [20, 40, 80]


def test_ranking_reports_what_each_profile_would_select():
    # Q~ .11, .40, .95 (31 = 30 + 1 in the denominator); KL per token 0, .1, .2, per sequence 0, 1, 2
    candidates = [
        make_candidate(20, [1] * 3 + [0] * 27),
        make_candidate(40, [1] * 12 + [0] * 18, log_w=-1.0),
        make_candidate(60, [1] * 29 + [0], log_w=-2.0),
    ]
    scores = rank(LEARNER, candidates, kl_scale=20.0)
    # kl_exp: .95/e^.2 wins; with kappa 20: .11 against .40/e^2 = .054 and .95/e^4 = .017
    # group2: .40/1.80 = .22 against .95/7.70 = .12; exp(2 KL): .11 against .40/7.4 = .055
    assert scores[0].selection_by_profile == {
        "faithful": "checkpoint:60",
        "group2": "checkpoint:40",
        "calibrated": "checkpoint:20",
        "seq_kl": "checkpoint:20",
        "argmax": "checkpoint:40",
        "one_se": "checkpoint:40",
    }
    assert all(score.selection_by_profile == scores[0].selection_by_profile for score in scores)


def test_ranking_by_one_standard_error_selects_the_nearer_equal():
    # 15 and 16 of 30 solved, each with prompts of its own: the lead is within its error
    near, far = make_candidate(20, [1] * 15 + [0] * 15), make_candidate(60, [0] * 14 + [1] * 16)
    assert chosen_step(rank(LEARNER, [near, far])) == 60
    assert chosen_step(rank(LEARNER, [near, far], selection_rule="one_se")) == 20


def test_ranking_depends_on_the_seed_alone():
    candidates = [make_candidate(20, [0, 1, 2] * 10), make_candidate(40, [1, 0, 3] * 10, log_w=-0.3)]
    assert rank(LEARNER, candidates) == rank(LEARNER, candidates)
    assert rank(LEARNER, candidates) != rank(LEARNER, candidates, seed=1)


def test_ranking_does_not_depend_on_the_order_of_candidates():
    candidates = [make_candidate(20, [0, 1, 2] * 10), make_candidate(40, [1, 0, 3] * 10, log_w=-0.3)]
    assert rank(LEARNER, candidates[::-1])[::-1] == rank(LEARNER, candidates)


def test_variance_of_all_candidates_is_lognormal_if_one_has_a_heavy_tail():
    calm, wild = make_candidate(20, [1] * 30), make_candidate(40, [2] * 30)
    ratios = list(wild.ratios)
    ratios[0] = make_drifted_ratio(9.0, 10, prompt_id="p00")  # one weight of 8103 beside 119 of 1
    scores = rank(LEARNER, [calm, replace(wild, ratios=ratios)], variance="ess")
    assert [score.variance_kind for score in scores] == ["seq2_lognormal"] * 2
    assert [score.is_unreliable for score in scores] == [False, True]
    # what was asked for stays on record: one weight holds nearly all, so V is nearly N = 120
    assert scores[1].variances["ess"] == pytest.approx(120 * (8103.08**2 + 119) / (8103.08 + 119) ** 2, rel=1e-4)
    assert scores[1].ess_fraction < 0.1


def test_variance_without_sequence_weights_ignores_heavy_tails():
    wild = make_candidate(40, [2] * 30)
    ratios = (make_drifted_ratio(9.0, 10, prompt_id="p00", correct=True), *wild.ratios[1:])
    (score,) = rank(LEARNER, [replace(wild, ratios=ratios)])
    assert (score.variance_kind, score.is_unreliable) == ("group2", False)
    assert score.ess_fraction < 0.1


def test_ranking_compares_a_dropped_candidate_on_shared_prompts():
    # first 10 prompts are easy for everyone; the finalist was also asked 20 hard ones
    dropped, finalist = make_candidate(20, [3] * 9 + [0]), make_candidate(40, [3] * 10 + [0] * 20)
    scores = rank(LEARNER, [dropped, finalist])
    assert scores[0].signal > scores[1].signal
    assert chosen_step(scores) == 40
    assert scores[1].p_best > 0.5


def test_variance_range_below_5_percent_is_warned_about():
    near, far = make_candidate(20, [1] * 30, log_w=-0.01), make_candidate(60, [2] * 30, log_w=-0.1)
    scores = rank(LEARNER, [near, far], variance="kl_exp")
    assert variance_range_warning(scores) == (
        "V (kl_exp) only ranges from 1.001 to 1.01 over 2 candidates (less than 5 %), so S = Q/V ranks them by Q "
        "alone and tends to choose the farthest"
    )


def test_variance_range_is_not_warned_about_if_wide_or_of_one_candidate():
    scores = rank(LEARNER, [make_candidate(20, [1] * 30), make_candidate(60, [2] * 30, log_w=-1.0)])
    assert variance_range_warning(scores) is None
    assert variance_range_warning(scores[:1]) is None


def test_ranking_without_failed_prompts_is_refused():
    nothing = replace(make_candidate(20, []), pass_counts=())
    with pytest.raises(NpoError):
        rank(replace(LEARNER, pass_counts=()), [nothing])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4),
    st.lists(st.floats(-30, 5), min_size=4, max_size=4),
    st.sampled_from(["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"]),
    st.sampled_from(["pass@1", "pass@k"]),
)
def test_ranking_of_any_results_is_sound(correct_AP, log_w_A, kind, quality):
    candidates = [make_candidate(20 * (a + 1), correct_P, log_w=log_w_A[a]) for a, correct_P in enumerate(correct_AP)]
    scores = rank(make_candidate(0, [0] * 6), candidates, variance=kind, quality=quality, bootstrap_resamples=50)
    assert sum(score.is_selected for score in scores) == 1
    assert sum(score.p_best for score in scores) == pytest.approx(1.0)
    for score in scores:
        assert 0 <= score.quality_low <= score.quality <= score.quality_high <= 1
        assert 0 < score.signal_low <= score.signal <= score.signal_high < math.inf
        assert 0 < score.variance_low <= score.variance <= score.variance_high < math.inf


def test_best_candidate_under_each_variance_kind():
    # Q~ 6.5/31, 24.5/31, 29.5/31. kl_exp 1, e^.05, e^.4; group2 1, 1.21, 13.4: the far one leads only where V is small
    candidates = [
        make_candidate(20, [1] * 6 + [0] * 24),
        make_candidate(40, [1] * 24 + [0] * 6, log_w=-0.5),
        make_candidate(80, [1] * 29 + [0] * 1, log_w=-0.9),
    ]
    scores = rank(LEARNER, candidates)
    best = {kind: score.step for score in scores for kind in score.best_for_variance_kinds}
    assert set(best) == {"kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"}
    assert [score.p_best_by_variance_kind["group2"] for score in scores] == [score.p_best for score in scores]
    assert best["group2"] == chosen_step(scores)
    # exp(2 x .9) = 6.0 and exp(2 x .5) = 2.7: S .16 and .29, and .21 for the nearest
    assert best["seq2_lognormal"] == 40
    # exp(.09) = 1.09 and exp(.05) = 1.05: S .87 and .75
    assert best["kl_exp"] == 80
    for kind in best:
        assert sum(score.p_best_by_variance_kind[kind] for score in scores) == pytest.approx(1)


# One candidate's score

EASY_LEARNER = make_candidate(0, [1, 0, 0, 0, 0, 0, 0, 0])


def test_score_of_one_candidate_by_hand():
    # 8 prompts x 4 samples, 4 prompts solved once: pass@4 = 4/8, pass@1 = 4/32
    guide = make_candidate(20, [1, 1, 1, 1, 0, 0, 0, 0], log_w=-1.0, num_tokens=10)
    (score,) = rank(EASY_LEARNER, [guide])
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


def test_score_reports_every_other_variance_kind():
    (score,) = rank(EASY_LEARNER, [make_candidate(20, [1] * 8, log_w=-1.0)])
    assert set(score.variances) == {"kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess"}
    assert score.variances["kl_exp"] == pytest.approx(math.exp(0.1))
    assert score.variances["tok2"] == pytest.approx(math.exp(-0.2))
    assert score.variances["seq2_lognormal"] == pytest.approx(math.exp(2.0))


def test_score_with_quality_pass_at_1():
    (score,) = rank(EASY_LEARNER, [make_candidate(20, [2] * 8)], quality="pass@1")
    assert (score.quality, score.pass_at_1, score.pass_at_k) == (0.5, 0.5, 1.0)
    assert score.quality_self == 1 / 32
    assert score.signal == pytest.approx((8 * 0.5 + 0.5) / 9)


def test_score_subtracts_the_kl_floor_of_the_learner():
    noisy = make_candidate(0, [0] * 8, log_w=-0.4, num_tokens=10)
    (score,) = rank(noisy, [make_candidate(20, [1] * 8, log_w=-1.4, num_tokens=10)])
    assert score.kl_per_sequence == pytest.approx(1.0)
    assert score.kl_per_token == pytest.approx(0.1)
    assert score.variance == pytest.approx((7 + math.e**2) / 8)


def test_score_compares_the_learner_on_the_candidates_prompts():
    # the learner solves p00 only; the candidate was asked two prompts
    (score,) = rank(EASY_LEARNER, [make_candidate(20, [4, 4])])
    assert (score.quality_self, score.quality_net) == (0.5, 0.5)


def test_score_of_a_guide_that_solves_nothing_is_finite_with_a_wide_interval():
    (score,) = rank(EASY_LEARNER, [make_candidate(20, [0] * 8)])
    assert score.quality == 0.0
    assert (score.quality_low, score.quality_high) == wilson(0, 8)
    assert score.signal == pytest.approx(0.5 / 9)


def test_score_measures_kl_on_all_samples_and_variance_on_correct_ones():
    guide = make_candidate(20, [2] * 16)
    ratios = tuple(replace(sample, log_w=-2.0 if sample.is_correct else 0.0) for sample in guide.ratios)
    (score,) = rank(make_candidate(0, [0] * 16), [replace(guide, ratios=ratios)])
    assert score.kl_per_sequence == pytest.approx(1.0)
    assert score.variances["seq2_lognormal"] == pytest.approx(math.exp(4.0))


def test_score_is_unreliable_below_32_samples():
    (few,) = rank(EASY_LEARNER, [make_candidate(20, [1] * 7)])  # 28 samples
    (enough,) = rank(EASY_LEARNER, [make_candidate(20, [1] * 8)])  # 32
    assert few.is_unreliable and not enough.is_unreliable


def test_score_without_importance_ratios_has_only_a_quality():
    measured, unknown = make_candidate(20, [1] * 8), replace(make_candidate(40, [2] * 8), ratios=())
    first, second = rank(EASY_LEARNER, [measured, unknown])
    assert (second.variance, second.signal, second.p_best, second.kl_per_token, second.variances) == (None,) * 4 + ({},)
    assert (second.note, second.quality, second.is_selected) == (NO_LOGPROBS_NOTE, 1.0, False)
    assert (first.p_best, first.is_selected) == (1.0, True)


def test_score_of_recorded_responses_counts_prompts_with_a_correct_one():
    recorded = replace(make_candidate(20, [3, 0, 1, 0], num_samples=5), is_fresh=False)
    counts = (*recorded.pass_counts, PromptPassCount(prompt_id="p04", num_samples=0, num_correct=0))
    (score,) = rank(EASY_LEARNER, [replace(recorded, pass_counts=counts)])
    assert (score.quality, score.quality_kind, score.pass_at_1) == (2 / 5, "any", 4 / 20)
    assert score.note == RECORDED_NOTE


# What a ranking is made of

SOLVES_NOTHING = make_candidate(0, [0] * 4)


def test_quality_k_of_pass_at_1_is_1():
    assert quality_k(formula(quality="pass@1", samples_per_prompt=8)) == 1
    assert quality_k(formula(quality="pass@k", samples_per_prompt=8)) == 8


def test_mean_quality_averages_over_prompts():
    # pass@2 of 0, 2 and 4 correct of 4: 0, 1 - C(2,2)/C(4,2) = 5/6, 1
    assert mean_quality(make_candidate(20, [0, 2, 4]), 2) == pytest.approx((0 + 5 / 6 + 1) / 3)


def test_sampled_prompts_of_all_candidates_are_sorted():
    assert list_sampled_prompts(SOLVES_NOTHING, [make_candidate(40, [1]), make_candidate(20, [1, 0, 0])]) == [
        "p00",
        "p01",
        "p02",
    ]


def test_ranking_without_candidates_is_refused():
    with pytest.raises(NpoError, match="no candidate guide for the learner at step 0"):
        list_sampled_prompts(SOLVES_NOTHING, [])


def test_ranking_for_a_learner_that_fails_nothing_is_refused():
    nothing = replace(make_candidate(20, []), pass_counts=())
    with pytest.raises(NpoError) as caught:
        list_sampled_prompts(replace(SOLVES_NOTHING, pass_counts=()), [nothing])
    assert "fails none of the screened prompts" in caught.value.message
    assert "scoring.num_prompts" in caught.value.hint


def test_ranking_asserts_one_count_per_prompt():
    twice = make_candidate(20, [1])
    with pytest.raises(AssertionError):
        list_sampled_prompts(SOLVES_NOTHING, [replace(twice, pass_counts=twice.pass_counts * 2)])


def candidates_of(*results):
    ids = list_sampled_prompts(SOLVES_NOTHING, results)
    counts_BP = np.ones((1, len(ids)))
    return build_candidates(SOLVES_NOTHING, results, ids, counts_BP=counts_BP, formula=FORMULA)


def test_variance_rests_on_correct_samples_once_every_candidate_has_32():
    few = make_candidate(40, [4] * 7 + [3])  # 31 correct of 32
    wide = make_candidate(20, [4] * 8 + [0] * 8)  # 32 correct, 32 wrong
    assert [each.drift.diagnostics.num_samples for each in candidates_of(wide)] == [32]
    # one candidate short of 32 puts all of them on all samples
    assert [each.drift.diagnostics.num_samples for each in candidates_of(wide, few)] == [64, 32]


def test_candidate_has_no_weight_on_prompts_without_samples():
    one, _ = candidates_of(make_candidate(20, [4, 0]), make_candidate(40, [1, 1, 1]))
    assert one.weights_BP.tolist() == [[1.0, 1.0, 0.0]]
    assert one.values_P.tolist() == [1.0, 0.0, 0.0]
    assert one.covered_P.sum() == 2
    assert one.drift.mean_length == 10
