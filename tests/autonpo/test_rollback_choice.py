from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_cli.autonpo.drift import DriftSamples
from npo_cli.autonpo.rollback_choice import RollbackKnobs, choose_rollback
from tests.autonpo.test_drift import on
from tests.autonpo.test_strata import outcomes
from tests.rollout.test_mistake_pool import strata_sized
from tests.scoring.samples import CAP

KNOBS = RollbackKnobs(
    variance="seq2_lognormal",
    kappa=1.0,
    cap=CAP,
    average="sequence",
    group_size=8,
    alpha=1.0,
    rule="argmax",
    direction="guide",
    resamples=400,
    seed=0,
    q_min=0.1,
    pool_min=8,
)
STRATA = strata_sized(40, 40, 40)
HALF_SOLVED = [outcome for j in range(3) for outcome in outcomes(j, *[0, 4] * 10)]
IDS = [outcome.prompt_id for outcome in HALF_SOLVED]


def back(distance, forward=None, backward=None) -> DriftSamples:
    """A checkpoint whose samples all have one log weight; the forward ones are of all probed prompts."""
    return DriftSamples(
        distance=distance,
        forward=[] if forward is None else on(IDS, forward),
        backward=[] if backward is None else on([f"2-{i:03}" for i in range(12)], backward),
    )


def judged(hindsights, *, strata=STRATA, probed=HALF_SOLVED, num_tokens=0, **changed):
    return choose_rollback(strata, probed, hindsights, knobs=replace(KNOBS, **changed), num_tokens=num_tokens)


# The choice


def test_signal_is_smoothed_quality_over_the_variance_of_the_slice():
    # Q = 1/2 of 20 and of 60 prompts, so Q~ = 1/2; V = exp(2 * .1) and exp(2 * .4)
    found = judged([back(10, -0.1), back(30, -0.4)])
    assert [score.variance for score in found.scores] == pytest.approx([np.exp(0.2), np.exp(0.8)])
    assert [score.signal for score in found.scores] == pytest.approx([0.5 * np.exp(-0.2), 0.5 * np.exp(-0.8)])
    assert [score.num_failed_prompts for score in found.scores] == [40, 120]
    assert [score.num_probed for score in found.scores] == [20, 60]
    assert (found.distance, found.is_accepted, found.reason) == (10, True, "")
    assert [score.is_selected for score in found.scores] == [True, False]


def test_quality_is_smoothed_by_the_prompts_asked_not_by_the_mistakes():
    # 3 of 3 solved: Q~ = (3 + .5)/4, though the slice has 40 mistakes
    found = judged([DriftSamples(distance=10, forward=[], backward=[])], probed=outcomes(0, 4, 4, 4))
    assert found.scores[0].signal == pytest.approx(3.5 / 4)


def test_a_slice_that_solves_more_can_be_worth_the_way():
    # .05 of the near slice, 35/60 of the far one, against V = 1.2 and 2.2: .08/1.2 < .58/2.2
    probed = outcomes(0, *[0] * 19, 4) + outcomes(1, *[4] * 20) + outcomes(2, *[4] * 14, *[0] * 6)
    found = judged([back(10, -0.1), back(30, -0.4)], probed=probed)
    assert found.scores[1].quality == pytest.approx(35 / 60)
    assert (found.distance, found.scores[1].p_best) == (30, 1.0)


def test_alpha_weighs_the_variance():
    probed = outcomes(0, *[0] * 10, *[4] * 10) + outcomes(1, *[4] * 20) + outcomes(2, *[4] * 20)
    # Q 1/2 and 5/6: log(5/3) = .51 against alpha * 2 * (.5 - .1) = .8 alpha
    assert judged([back(10, -0.1), back(30, -0.5)], probed=probed, alpha=1.0).distance == 10
    assert judged([back(10, -0.1), back(30, -0.5)], probed=probed, alpha=0.5).distance == 30


def test_strata_between_checkpoints_belong_to_the_larger_slices():
    # no checkpoint 20 steps back: its 40 mistakes are still undone by 30
    found = judged([back(30, -0.1), back(10, -0.1)])
    assert [score.distance for score in found.scores] == [10, 30]
    assert [line.max_age for line in found.strata] == [10, 20, 30]
    assert found.scores[1].num_failed_prompts == 120


def test_of_equals_the_nearest_is_taken():
    for rule in ("argmax", "one_se"):
        # the slices differ in M alone, and with Q = 1/2 in nothing that S can see
        assert judged([back(30, -0.2), back(20, -0.2)], rule=rule).distance == 20


def test_one_se_prefers_the_nearer_of_two_that_cannot_be_told_apart():
    # 10 of 20 against 31 of 60, same V: the far one leads by log(31.5/61) - log(1/2) = .03, SE about .1
    probed = outcomes(0, *[0, 4] * 10) + outcomes(1, *[0, 4] * 10) + outcomes(2, *[0, 4] * 9, 4, 4)
    found = judged([back(10, -0.2), back(30, -0.2)], probed=probed)
    assert found.distance == 30
    assert (found.selection_by_profile["argmax"], found.selection_by_profile["one_se"]) == (30, 10)
    assert judged([back(10, -0.2), back(30, -0.2)], probed=probed, rule="one_se").distance == 10


def test_every_profile_says_what_it_would_have_chosen():
    # Q 1/2 and 5/6 of 20 and 60 prompts: Q~ rises by a factor 1.66. V rises, on 5 tokens with KL .2 and 1 a sequence,
    # faithful exp(.16) = 1.17; calibrated (kappa 10) exp(1.6) = 5; seq_kl exp(1.6); group2 (7 + e^2)/(7 + e^.4) = 1.69
    probed = outcomes(0, *[0, 4] * 10) + outcomes(1, *[4] * 20) + outcomes(2, *[4] * 20)
    found = judged([back(10, -0.2), back(30, -1.0)], probed=probed, kappa=10.0)
    assert found.selection_by_profile == {
        "faithful": 30,
        "group2": 10,
        "calibrated": 10,
        "seq_kl": 10,
        "argmax": 10,
        "one_se": 10,
    }
    # uncalibrated, the published form hardly sees the distance
    found = judged([back(10, -0.2), back(30, -1.0)], probed=probed)
    assert (found.selection_by_profile["calibrated"], found.selection_by_profile["seq_kl"]) == (30, 10)


@settings(max_examples=25, deadline=None)
@given(
    correct=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    logs=st.lists(st.floats(-2, 0), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_the_chances_of_being_best_sum_to_one(correct, logs, seed):
    probed = outcomes(0, *correct[:2]) + outcomes(1, *correct[2:4]) + outcomes(2, *correct[4:])
    found = judged([back(d, log_w) for d, log_w in zip((10, 20, 30), logs, strict=True)], probed=probed, seed=seed)
    assert sum(score.p_best for score in found.scores) == pytest.approx(1.0)
    assert sum(score.is_selected for score in found.scores) == 1
    for score in found.scores:
        assert score.quality_low <= score.quality <= score.quality_high
        assert score.signal_low <= score.signal <= score.signal_high
        assert score.variance_low <= score.variance <= score.variance_high


def test_the_same_seed_gives_the_same_confirmation():
    probed = outcomes(0, 0, 1, 2, 3, 4, 1) + outcomes(1, 1, 1, 4, 0) + outcomes(2, 0, 0, 2)
    hindsights = [back(10, -0.1, -0.2), back(20, -0.3, -0.2), back(30, -0.3, -0.4)]
    assert judged(hindsights, probed=probed) == judged(hindsights[::-1], probed=probed)
    assert judged(hindsights, probed=probed) != judged(hindsights, probed=probed, seed=1)


# The direction of V


def test_the_direction_says_which_variance_enters():
    for direction, expected in (("guide", 0.2), ("learner", 0.6)):
        (score,) = judged([back(30, -0.1, -0.3)], direction=direction).scores
        assert score.variance == pytest.approx(np.exp(expected))
        assert (score.variance_forward, score.variance_backward) == pytest.approx((np.exp(0.2), np.exp(0.6)))
        assert score.kl_per_sequence == pytest.approx(expected / 2)
        assert score.kl_per_token == pytest.approx(expected / 10)
        assert score.variances["seq2_lognormal"] == score.variance
        assert (score.num_backward_samples, score.variances_agree) == (48, False)


def test_where_one_direction_is_missing_the_other_one_enters():
    (score,) = judged([back(30, None, -0.3)]).scores
    assert (score.variance, score.variance_backward) == pytest.approx((np.exp(0.6), np.exp(0.6)))
    assert (score.variance_forward, score.variances_agree, score.has_heavy_tail) == (None, None, None)
    (score,) = judged([back(30, -0.1)], direction="learner").scores
    assert score.variance == pytest.approx(np.exp(0.2))
    assert (score.variance_backward, score.num_backward_samples) == (None, 0)


def test_a_distance_never_measured_does_not_win_against_a_measured_one():
    found = judged([back(10), back(30, -3.0)])
    assert found.distance == 30
    assert (found.scores[0].variance, found.scores[0].variances, found.scores[0].p_best) == (1.0, {}, 0.0)
    assert judged([back(10), back(30)]).distance == 10


def test_a_second_moment_that_few_samples_decide_gives_way():
    # one sample in 240 has w = e^4, the others e^-2: its share of the sum of weights is 55/(55 + 32)
    (mild,) = judged([back(30, -0.2)], variance="seq2").scores
    forward = on(IDS, -2.0)
    heavy = DriftSamples(distance=10, forward=[*on(IDS[:1], 4.0, num=1), *forward[1:]], backward=[])
    found = judged([heavy, back(30, -0.2)], variance="seq2")
    assert mild.variance_kind == "seq2"
    assert {score.variance_kind for score in found.scores} == {"seq2_lognormal"}


def test_tails_are_compared_on_every_line():
    (calm,) = judged([back(30, 0.0, 0.0)]).scores
    (alarmed,) = judged([back(30, 0.0, -3.0)]).scores
    assert (calm.has_heavy_tail, alarmed.has_heavy_tail) == (False, True)


def test_policies_far_apart_do_not_overflow():
    found = judged([back(10, -600.0, -600.0), back(30, -700.0, -700.0)])
    assert all(np.isfinite([score.variance, score.signal, score.signal_high]).all() for score in found.scores)


# The verdict


def test_without_a_checkpoint_there_is_no_way_back():
    found = judged([])
    assert (found.is_accepted, found.reason, found.distance) == (False, "no checkpoint to go back to", None)
    assert (found.scores, found.selection_by_profile) == ((), {})
    assert [line.num_probed for line in found.strata] == [20, 20, 20]


def test_a_short_list_of_mistakes_is_not_worth_a_rollback():
    found = judged([back(10), back(30)], strata=strata_sized(5, 3, 4), probed=outcomes(0, 4), pool_min=64)
    assert found.reason == "only 12 mistakes in the last 30 steps; autonpo.rollback.min_failed_prompts is 64"
    assert (found.is_accepted, found.distance, found.selection_by_profile) == (False, None, {})
    # the figures are reported all the same
    assert [(score.quality, score.p_best, score.is_selected) for score in found.scores] == [(1.0, 0.0, False)] * 2


def test_only_distances_with_enough_mistakes_may_be_chosen():
    found = judged([back(10, 0.0), back(20, -1.0), back(30, -2.0)], pool_min=80)
    assert found.distance == 20
    assert found.scores[0].signal > found.scores[1].signal
    assert [score.p_best for score in found.scores] == [0.0, 1.0, 0.0]
    assert set(found.selection_by_profile.values()) <= {20, 30}
    # exactly as many are enough
    assert judged([back(30, -0.1)], pool_min=120).is_accepted
    assert not judged([back(30, -0.1)], pool_min=121).is_accepted


def test_mistakes_never_asked_again_prove_nothing():
    found = judged([back(10, -0.1), back(20, -0.1)], probed=outcomes(2, 4))
    assert found.reason == "none of the 80 mistakes in the last 20 steps was asked again"
    assert (found.is_accepted, found.scores) == (False, ())


def test_a_policy_that_still_fails_is_sent_on():
    # all of 20 wrong: Wilson's upper bound is 3.8415/23.8415 = .161
    found = judged([back(10, 0.0)], probed=outcomes(0, *[0] * 20))
    assert not found.is_accepted
    assert (
        found.reason
        == "the policy solves 0 % [0 %, 16.1 %] of the mistakes in the last 10 steps; autonpo.probe.min_quality is 10 %"
    )
    assert (found.distance, found.scores[0].is_selected) == (10, True)


def test_the_lower_bound_decides_not_the_estimate():
    # 4 of 20 prompts solved: .2 -+ 1.96 * sqrt(.2 * .8/20) = .02 to .38; 40 of 200 narrow it to .145 to .255
    few = judged([back(10)], probed=outcomes(0, *[4] * 4, *[0] * 16))
    many = judged([back(10)], strata=strata_sized(400), probed=outcomes(0, *[4] * 40, *[0] * 160))
    assert (few.scores[0].quality, many.scores[0].quality) == (0.2, 0.2)
    assert (few.is_accepted, many.is_accepted) == (False, True)
    assert many.scores[0].quality_low == pytest.approx(0.145, abs=0.015)
    assert few.reason.startswith("the policy solves 20 % [")


def test_one_lucky_prompt_is_not_a_proof():
    # Wilson's lower bound of 1 in 1 is 1/(1 + 3.8415) = .207
    found = judged([back(10)], probed=outcomes(0, 4), q_min=0.25)
    assert not found.is_accepted
    assert found.scores[0].quality_low == pytest.approx(0.2065, abs=1e-4)


def test_a_confirmation_says_what_it_cost():
    found = judged([back(10, -0.1)], num_tokens=1234)
    assert (found.num_prompts, found.num_samples, found.num_tokens) == (60, 240, 1234)
