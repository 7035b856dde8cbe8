import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_cli.errors import NpoError
from npo_cli.scoring.evidence import CandidateResults
from npo_cli.scoring.ranking import find_best_per_variance, rank_candidates, variance_range_warning
from tests.scoring.samples import SIGNAL, make_candidate, make_drifted_ratio

LEARNER = make_candidate(0, [0] * 30)


def chosen_step(scores):
    (step,) = [score.step for score in scores if score.is_selected]
    return step


def test_a_clearly_better_guide_is_chosen_with_confidence():
    # Q .2, .8, .9 of 30 prompts; group2 V 1, 1.21, 13.4: S about .21, .65, .07
    arms = [
        make_candidate(20, [1] * 6 + [0] * 24),
        make_candidate(40, [1] * 24 + [0] * 6, log_w=-0.5),
        make_candidate(80, [1] * 27 + [0] * 3, log_w=-4.0),
    ]
    scores = rank_candidates(LEARNER, arms, SIGNAL)
    assert chosen_step(scores) == 40
    assert scores[1].p_best > 0.95
    assert sum(score.p_best for score in scores) == pytest.approx(1.0)
    assert [score.step for score in scores] == [20, 40, 80]


def test_each_profile_says_whom_it_would_have_chosen():
    # Q~ .11, .40, .95 (31 = 30 + 1 in the denominator); KL per token 0, .1, .2, per sequence 0, 1, 2
    arms = [
        make_candidate(20, [1] * 3 + [0] * 27),
        make_candidate(40, [1] * 12 + [0] * 18, log_w=-1.0),
        make_candidate(60, [1] * 29 + [0], log_w=-2.0),
    ]
    scores = rank_candidates(LEARNER, arms, replace(SIGNAL, kappa=20.0))
    # kl_exp: .95/e^.2 wins; with kappa 20: .11 against .40/e^2 = .054 and .95/e^4 = .017
    # group2: .40/1.80 = .22 against .95/7.70 = .12; exp(2 KL): .11 against .40/7.4 = .055
    assert scores[0].selection_by_profile == {
        "faithful": 60,
        "group2": 40,
        "calibrated": 20,
        "seq_kl": 20,
        "one_se": 40,
    }
    assert all(score.selection_by_profile == scores[0].selection_by_profile for score in scores)


def test_one_standard_error_rule_stops_at_the_nearer_equal():
    # 15 and 16 of 30 solved, each with prompts of its own: the lead is within its error
    near, far = make_candidate(20, [1] * 15 + [0] * 15), make_candidate(60, [0] * 14 + [1] * 16)
    assert chosen_step(rank_candidates(LEARNER, [near, far], SIGNAL)) == 60
    assert chosen_step(rank_candidates(LEARNER, [near, far], replace(SIGNAL, rule="one_se"))) == 20


def test_a_ranking_depends_on_the_seed_alone():
    arms = [make_candidate(20, [0, 1, 2] * 10), make_candidate(40, [1, 0, 3] * 10, log_w=-0.3)]
    assert rank_candidates(LEARNER, arms, SIGNAL) == rank_candidates(LEARNER, arms, SIGNAL)
    assert rank_candidates(LEARNER, arms, SIGNAL) != rank_candidates(LEARNER, arms, replace(SIGNAL, seed=1))


def test_candidates_do_not_depend_on_their_order():
    arms = [make_candidate(20, [0, 1, 2] * 10), make_candidate(40, [1, 0, 3] * 10, log_w=-0.3)]
    assert rank_candidates(LEARNER, arms[::-1], SIGNAL)[::-1] == rank_candidates(LEARNER, arms, SIGNAL)


def test_heavy_tails_anywhere_put_everyone_on_the_lognormal_moment():
    calm, wild = make_candidate(20, [1] * 30), make_candidate(40, [2] * 30)
    ratios = list(wild.ratios)
    ratios[0] = make_drifted_ratio(9.0, 10, prompt_id="p00")  # one weight of 8103 beside 119 of 1
    scores = rank_candidates(LEARNER, [calm, replace(wild, ratios=ratios)], replace(SIGNAL, variance="ess"))
    assert [score.variance_kind for score in scores] == ["seq2_lognormal"] * 2
    assert [score.is_unreliable for score in scores] == [False, True]
    # what was asked for stays on record: one weight holds nearly all, so V is nearly N = 120
    assert scores[1].variances["ess"] == pytest.approx(120 * (8103.08**2 + 119) / (8103.08 + 119) ** 2, rel=1e-4)
    assert scores[1].ess_fraction < 0.1


def test_kinds_that_never_weigh_sequences_do_not_mind_heavy_tails():
    wild = make_candidate(40, [2] * 30)
    ratios = (make_drifted_ratio(9.0, 10, prompt_id="p00", correct=True), *wild.ratios[1:])
    (score,) = rank_candidates(LEARNER, [replace(wild, ratios=ratios)], SIGNAL)
    assert (score.variance_kind, score.is_unreliable) == ("group2", False)
    assert score.ess_fraction < 0.1


def test_a_candidate_dropped_by_halving_cannot_win_on_easy_prompts():
    # first 10 prompts are easy for everyone; the finalist was also asked 20 hard ones
    dropped, finalist = make_candidate(20, [3] * 9 + [0]), make_candidate(40, [3] * 10 + [0] * 20)
    scores = rank_candidates(LEARNER, [dropped, finalist], SIGNAL)
    assert scores[0].signal > scores[1].signal
    assert chosen_step(scores) == 40
    assert scores[1].p_best > 0.5


def test_flat_variances_are_pointed_out():
    near, far = make_candidate(20, [1] * 30, log_w=-0.01), make_candidate(60, [2] * 30, log_w=-0.1)
    scores = rank_candidates(LEARNER, [near, far], replace(SIGNAL, variance="kl_exp"))
    assert variance_range_warning(scores) == (
        "V (kl_exp) only ranges from 1.001 to 1.01 over 2 candidates (less than 5 %), so S = Q/V ranks them by Q "
        "alone and tends to choose the farthest"
    )


def test_variances_that_differ_or_stand_alone_need_no_warning():
    scores = rank_candidates(LEARNER, [make_candidate(20, [1] * 30), make_candidate(60, [2] * 30, log_w=-1.0)], SIGNAL)
    assert variance_range_warning(scores) is None
    assert variance_range_warning(scores[:1]) is None


def test_no_failing_prompt_is_a_users_error():
    nothing = CandidateResults(step=20, distance=20, pass_counts=(), ratios=())
    with pytest.raises(NpoError):
        rank_candidates(replace(LEARNER, pass_counts=()), [nothing], SIGNAL)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4),
    st.lists(st.floats(-30, 5), min_size=4, max_size=4),
    st.sampled_from(["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"]),
    st.sampled_from(["pass@1", "pass@k"]),
)
def test_any_evidence_makes_a_sound_ranking(correct_AP, log_w_A, kind, quality):
    arms = [make_candidate(20 * (a + 1), correct_P, log_w=log_w_A[a]) for a, correct_P in enumerate(correct_AP)]
    knobs = replace(SIGNAL, variance=kind, quality=quality, resamples=50)
    scores = rank_candidates(make_candidate(0, [0] * 6), arms, knobs)
    assert sum(score.is_selected for score in scores) == 1
    assert sum(score.p_best for score in scores) == pytest.approx(1.0)
    for score in scores:
        assert 0 <= score.quality_low <= score.quality <= score.quality_high <= 1
        assert 0 < score.signal_low <= score.signal <= score.signal_high < math.inf
        assert 0 < score.variance_low <= score.variance <= score.variance_high < math.inf


def test_every_kind_of_v_names_its_own_leader_from_the_same_resamples():
    # Q~ 6.5/31, 24.5/31, 29.5/31. kl_exp 1, e^.05, e^.4; group2 1, 1.21, 13.4: the far one leads only where V is small
    arms = [
        make_candidate(20, [1] * 6 + [0] * 24),
        make_candidate(40, [1] * 24 + [0] * 6, log_w=-0.5),
        make_candidate(80, [1] * 29 + [0] * 1, log_w=-0.9),
    ]
    found = find_best_per_variance(LEARNER, arms, SIGNAL)
    ranked = rank_candidates(LEARNER, arms, SIGNAL)
    assert set(found) == {"kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"}
    assert [found["group2"].p_best_A[place] for place in range(3)] == [score.p_best for score in ranked]
    assert arms[found["group2"].index].step == chosen_step(ranked)
    # exp(2 x .9) = 6.0 and exp(2 x .5) = 2.7: S .16 and .29, and .21 for the nearest
    assert found["seq2_lognormal"].index == 1
    # exp(.09) = 1.09 and exp(.05) = 1.05: S .87 and .75
    assert found["kl_exp"].index == 2
    assert all(sum(lead.p_best_A) == pytest.approx(1) for lead in found.values())
