import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_cli.errors import NpoError
from npo_cli.scoring.forecast import ReplaySegment
from npo_cli.scoring.quality import PromptPassCount, wilson
from npo_cli.scoring.ranking import (
    ALL_SAMPLES_NOTE,
    NO_LOGPROBS_NOTE,
    RECORDED_NOTE,
    build_candidates,
    list_sampled_prompts,
    mean_quality,
    quality_k,
    variance_range_warning,
)
from npo_cli.types.scores import GuideChoice, choose_guide
from tests.scoring.samples import FORMULA, formula, make_candidate, make_drifted_ratio, rank, rank_with_none

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
    # Q .2, .4, .97, the learner's 0; KL per token 0, .1, .2, per sequence 0, 1, 2
    candidates = [
        make_candidate(20, [1] * 6 + [0] * 24),
        make_candidate(40, [1] * 12 + [0] * 18, log_w=-1.0),
        make_candidate(60, [1] * 29 + [0], log_w=-2.0),
    ]
    scores = rank(LEARNER, candidates, kl_scale=20.0)
    # kl_exp: .97/e^.2 = .79 wins; with kappa 20: .2 against .4/e^2 = .054 and .97/e^4 = .018
    # group2: .4/1.80 = .22 against .2 and .97/7.70 = .13; exp(2 KL): .2 against .4/7.4 = .054
    # the lead of .02 is within its error; no candidate has a forecast
    assert scores[0].selection_by_profile == {
        "faithful": "checkpoint:60",
        "group2": "checkpoint:40",
        "calibrated": "checkpoint:20",
        "seq_kl": "checkpoint:20",
        "argmax": "checkpoint:40",
        "one_se": "checkpoint:20",
        "value": "none",
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
    # one weight of 8103 beside 59 of 1 among the correct samples
    ratios[0] = make_drifted_ratio(9.0, 10, prompt_id="p00", correct=True)
    scores = rank(LEARNER, [calm, replace(wild, ratios=ratios)], variance="ess")
    assert [score.variance_kind for score in scores] == ["seq2_lognormal"] * 2
    assert [score.is_unreliable for score in scores] == [False, True]
    # the V of the settings is recorded too: one weight holds nearly all, so V is nearly N = 60
    assert scores[1].variances["ess"] == pytest.approx(60 * (8103.08**2 + 59) / (8103.08 + 59) ** 2, rel=1e-4)
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
        "V (kl_exp) only ranges from 1.001 to 1.01 over 2 candidates (less than 5 %), so S ranks them by Q "
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
    learner, others = make_candidate(0, [0, 0, 0, 0, 1, 1]), {"quality": quality, "bootstrap_resamples": 50}
    *guides, nothing = scores = rank_with_none(learner, candidates, variance=kind, **others)
    assert sum(score.is_selected for score in scores) == 1
    assert sum(score.p_best for score in scores) == pytest.approx(1.0)
    assert (nothing.quality_net, nothing.variance, nothing.signal, nothing.price) == (0, 1, 0, 0)
    for score in guides:
        assert score.quality_net_low > 0 or not score.is_selected
    for score in scores:
        assert 0 <= score.quality_low <= score.quality <= score.quality_high <= 1
        assert -1.5 <= score.quality_net_low <= score.quality_net <= score.quality_net_high <= 1.5
        assert 0 <= score.signal_low <= score.signal <= score.signal_high < math.inf
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
    # 8 prompts x 4 samples, 4 prompts solved once: pass@4 = 4/8, pass@1 = 4/32. The learner solves the first too
    guide = make_candidate(20, [1, 1, 1, 1, 0, 0, 0, 0], log_w=-1.0, num_tokens=10)
    (score,) = rank(EASY_LEARNER, [guide])
    assert (score.quality, score.pass_at_k, score.pass_at_1) == (0.5, 0.5, 0.125)
    assert (score.quality_self, score.quality_net) == (0.125, 0.375)
    assert (score.kl_per_token, score.kl_per_sequence) == (pytest.approx(0.1), pytest.approx(1.0))
    # one slot of 8 with moment e^2
    assert score.variance == pytest.approx((7 + math.e**2) / 8)
    assert score.signal == pytest.approx(0.375 / ((7 + math.e**2) / 8))
    (published,) = rank(EASY_LEARNER, [guide], quality_baseline="none")
    # Q~ = 4.5/9
    assert published.signal == pytest.approx(0.5 / ((7 + math.e**2) / 8))
    assert (score.num_prompts, score.num_samples, score.mean_length) == (8, 32, 10.0)
    assert score.ess_fraction == pytest.approx(1.0)
    assert (score.step, score.distance, score.quality_kind, score.variance_kind) == (20, 20, "pass@k", "group2")
    # a resample of 8 without one of the three prompts that only the guide solves
    assert score.p_best == pytest.approx(1 - (5 / 8) ** 8, abs=0.02) and not score.is_unreliable


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
    assert score.signal == pytest.approx(0.5 - 1 / 32)


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


def test_score_of_a_guide_that_solves_nothing_has_a_wide_interval_and_no_guide_is_selected():
    score, nothing = rank_with_none(EASY_LEARNER, [make_candidate(20, [0] * 8)])
    assert (score.quality, score.quality_net, score.signal, score.p_best) == (0.0, -1 / 8, 0.0, 0.0)
    assert (score.quality_low, score.quality_high) == wilson(0, 8)
    assert (nothing.candidate, nothing.is_selected, nothing.p_best) == ("none", True, 1.0)
    assert nothing.note.startswith(
        "no candidate is shown to solve more than the learner's own second try (the best, checkpoint:20: -0.125 ["
    )
    assert choose_guide((score, nothing)) == GuideChoice(chosen=None, reason=nothing.note)


def test_no_guide_is_selected_unless_the_lower_bound_of_the_net_quality_is_above_zero():
    # 2 of 30 more than the learner: P(a resample has neither) = (28/30)^30 = .13, so the lower bound is 0
    weak, nothing = rank_with_none(LEARNER, [make_candidate(20, [1] * 2 + [0] * 28)])
    assert (weak.quality_net_low, weak.is_selected, nothing.is_selected) == (0.0, False, True)
    # the share of those resamples: in them no guide is as good
    assert nothing.p_best == pytest.approx((28 / 30) ** 30, abs=0.05)
    # 6 of 30: (24/30)^30 = .001
    strong, nothing = rank_with_none(LEARNER, [make_candidate(20, [1] * 6 + [0] * 24)])
    assert (strong.is_selected, nothing.is_selected, nothing.note) == (True, False, "")
    assert strong.quality_net_low > 0


def test_published_score_lets_the_learner_itself_win():
    # Q .5 beyond doubt above the learner's .27, but V = e^2: .5/7.4 < .27
    learner, guide = make_candidate(0, [1] * 8 + [0] * 22), make_candidate(20, [1] * 15 + [0] * 15, log_w=-1.0)
    published = {"variance": "seq2_lognormal", "quality_baseline": "none"}
    score, nothing = rank_with_none(learner, [guide], **published)
    assert score.quality_net_low > 0
    assert (nothing.is_selected, nothing.note) == (True, "the learner's own second try has the larger S")
    assert rank(learner, [guide], variance="seq2_lognormal")[0].is_selected


# The rule `value`

SEGMENT = ReplaySegment(
    num_steps=20,
    lost_steps=20,
    num_prompts=100,
    samples_all=True,
    eligible_share=0.5,
    eligible_per_step=8.0,
    correct_per_step=4.0,
    tokens_per_step=1000.0,
    slots=1,
    most_draws=8,
    draws_per_round=2,
    scoring_tokens=3000,
)


def with_segment(guide, **changes):
    return replace(guide, segment=replace(SEGMENT, **changes), num_tokens=10 * len(guide.ratios))


def test_value_is_steps_saved_over_price_by_hand():
    # half of 30 prompts solved in 2 of 4 samples, the learner none: Q_net = 1/2
    guide = with_segment(make_candidate(20, [2] * 15 + [0] * 15))
    (score,) = rank(LEARNER, [guide])
    # 20 steps x 8 groups x 1/2 = 80 correct responses, 4 to a step
    assert score.steps_saved == pytest.approx(20.0)
    # draws: 8 where never solved, 2 (1 + 1/4 + 1/16 + 1/64) = 2.65625 where half are; other prompts 2; 10 tokens each
    draws = 50 * (8 + 2.65625) / 2 + 50 * 2
    assert score.price == pytest.approx(20 + (10 * draws + 3000) / 1000)
    (failed_only,) = rank(LEARNER, [replace(guide, segment=replace(guide.segment, samples_all=False))])
    assert failed_only.price == pytest.approx(score.price - 10 * 50 * 2 / 1000)
    assert score.value == pytest.approx(score.steps_saved / score.price)
    # the interval is that of Q_net
    assert score.value_low / score.value == pytest.approx(score.quality_net_low / 0.5)
    assert score.value_high / score.value == pytest.approx(score.quality_net_high / 0.5)


def test_rule_value_selects_the_largest_value_of_at_least_one():
    near = with_segment(make_candidate(20, [2] * 15 + [0] * 15), lost_steps=5)
    far = with_segment(make_candidate(60, [2] * 30), lost_steps=60)
    # 20 steps saved for 5 + 3 + 3.7, and 40 for 60 + 3 + 2.3
    for rule, chosen in (("argmax", 60), ("value", 20)):
        assert chosen_step(rank(LEARNER, [near, far], selection_rule=rule)) == chosen
    score, nothing = rank_with_none(LEARNER, [far], selection_rule="value")
    assert score.value < 1 and nothing.is_selected
    assert nothing.note.startswith(
        "no candidate is expected to save as many steps as it costs (the best, checkpoint:60: 40.0 steps saved for 65."
    )
    _, nothing = rank_with_none(LEARNER, [replace(far, segment=None)], selection_rule="value")
    assert nothing.note == "the run has no record of the steps to replay, so their value cannot be forecast"


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
    assert (score.quality, score.quality_kind, score.pass_at_1) == (2 / 5, "any", 4 / 25)
    assert score.note == f"{RECORDED_NOTE}; {ALL_SAMPLES_NOTE}"


# What a ranking is made of

SOLVES_NOTHING = make_candidate(0, [0] * 16)


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


def test_variance_rests_on_correct_samples_of_each_candidate_that_has_32():
    wide = make_candidate(20, [4] * 8 + [0] * 8)  # 32 correct, 32 wrong
    assert [each.drift.diagnostics.num_samples for each in candidates_of(wide)] == [32]
    # one candidate short of 32 is measured on all of its samples, and does not change the other
    few = make_candidate(40, [4] * 7 + [3] + [0] * 8)
    assert [each.drift.diagnostics.num_samples for each in candidates_of(wide, few)] == [32, 64]


def test_candidate_has_no_weight_on_prompts_without_samples():
    one, _ = candidates_of(make_candidate(20, [4, 0]), make_candidate(40, [1, 1, 1]))
    assert one.weights_BP.tolist() == [[1.0, 1.0, 0.0]]
    assert one.values_P.tolist() == [1.0, 0.0, 0.0]
    assert one.covered_P.sum() == 2
    assert one.drift.mean_length == 10
