"""Selection rules against gains written by hand."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from npo_cli.experiments.selection_rules import (
    LearnerGains,
    Rule,
    choose_candidate,
    evaluate_rules,
    list_rules,
    rank_correlations,
)
from npo_cli.types.calibration import CandidateGain, RuleResult


def candidate(name: str, gain: float, **fields: Any) -> CandidateGain:
    """Q_self is 0.2 and the price 10 steps unless said otherwise."""
    quality = fields.pop("quality", 0.2)
    values: dict[str, Any] = {
        "branch": "main",
        "learner_step": 40,
        "candidate": name,
        "distance": None,
        "gain": gain,
        "gain_low": gain,
        "gain_high": gain,
        "gains_by_seed": (gain,),
        "accuracy": 0.5 + gain,
        "accuracy_unguided": 0.5,
        "num_heldout": 4,
        "quality": quality,
        "quality_self": 0.2,
        "quality_net": quality - 0.2,
        "num_failed": 9,
        "variances": {},
        "num_prompts": 10,
        "num_solved": 5,
        "injected_per_step": 1.0,
        "steps_thrown_away": 10,
        "guide_tokens": 0,
        "price": 10.0,
    }
    return CandidateGain(**{**values, **fields})


def learner(*candidates: CandidateGain, resamples: int = 1) -> LearnerGains:
    """Without spread: every resample is the data."""
    return LearnerGains(
        candidates=candidates, gains_BA=np.tile([one.gain for one in candidates], (resamples, 1)).astype(float)
    )


def results(*learners: LearnerGains, kinds: tuple[str, ...] = ()) -> dict[str, RuleResult]:
    return {one.rule: one for one in evaluate_rules(learners, list_rules(kinds))}


def test_rank_correlation_gives_ties_their_average_rank():
    """Scores 1 2 2 3 have ranks 1 2.5 2.5 4, gains .1 .3 .2 .4 ranks 1 3 2 4; deviations -1.5 0 0 1.5 and
    -1.5 .5 -.5 1.5: 4.5 / sqrt(4.5 * 5)."""
    scores_A, gains_BA = np.array([1.0, 2.0, 2.0, 3.0]), np.array([[0.1, 0.3, 0.2, 0.4], [0.4, 0.2, 0.2, 0.1]])
    found_B = rank_correlations(scores_A, gains_BA)
    assert found_B[0] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert found_B[1] == pytest.approx(-1)
    assert found_B == pytest.approx([spearmanr(scores_A, row).statistic for row in gains_BA])


def test_rank_correlation_is_undefined_without_two_different_values():
    gains_BA = np.array([[0.1, 0.2], [0.3, 0.3]])
    assert np.isnan(rank_correlations(np.array([1.0, 1.0]), gains_BA)).all()
    assert np.isnan(rank_correlations(np.array([1.0, 2.0]), gains_BA)).tolist() == [False, True]
    assert np.isnan(rank_correlations(np.array([1.0]), gains_BA[:, :1])).all()


def test_rank_correlation_takes_rounding_errors_for_ties():
    assert rank_correlations(np.array([1.0, 2.0, 3.0]), np.array([[0.1 + 0.2, 0.3, 0.5]])) == pytest.approx(
        spearmanr([1, 2, 3], [1, 1, 2]).statistic
    )


def test_choice_is_the_largest_score_above_that_of_no_guide():
    assert choose_candidate([0.1, 0.5, None], 0.2, prices=[1, 1, 1]) == 1
    assert choose_candidate([0.1, 0.2, None], 0.2, prices=[1, 1, 1]) is None
    # A difference of rounding is none, and of equal scores the cheaper is chosen.
    assert choose_candidate([0.2 + 1e-9], 0.2, prices=[1]) is None
    assert choose_candidate([0.5, 0.5], 0.2, prices=[9, 3]) == 1
    assert choose_candidate([-3.0], -math.inf, prices=[1]) == 0


def test_regret_is_the_largest_gain_minus_that_of_the_choice():
    """Q names b (.3 - .1 = .2 too little), Q/kl_exp a: 0.45/1 against 0.83/4 (smoothed over 9 prompts)."""
    found = results(
        learner(
            candidate("a", 0.3, quality=0.45, variances={"kl_exp": 1.0}, price=20.0),
            candidate("b", 0.1, quality=0.9, variances={"kl_exp": 4.0}, price=5.0),
        ),
        kinds=("kl_exp",),
    )
    assert (found["Q"].learners[0].choice, found["Q"].learners[0].best) == ("b", "a")
    assert found["Q"].regret == pytest.approx(0.2)
    assert found["Q"].share == pytest.approx(1 / 3)
    # Per step of the price: b .1/5 = .02, a .3/20 = .015. The best is b.
    assert found["Q"].share_per_cost == pytest.approx(1)
    assert (found["Q/kl_exp"].learners[0].choice, found["Q/kl_exp"].regret) == ("a", 0)
    assert found["Q/kl_exp"].share_per_cost == pytest.approx(0.75)
    assert found["Q/kl_exp"].regret_minus["Q"] == pytest.approx((-0.2, -0.2, -0.2))
    # Q_net/V: .25/1 against .7/4 = .175; per price .25/20 = .0125 against .175/5 = .035.
    assert found["Q_net/kl_exp"].learners[0].choice == "a"
    assert found["Q_net/kl_exp/price"].learners[0].choice == "b"
    # Neither is on the line.
    assert "farthest" not in found


def test_no_guide_has_gain_0_and_is_right_where_every_guide_hurts():
    """No Q is above the learner's own .2: Q_net chooses no guide and regrets nothing; the farthest costs .05."""
    found = results(
        learner(candidate("near", -0.1, quality=0.1, distance=20), candidate("far", -0.05, quality=0.2, distance=100))
    )
    for rule in ("Q", "Q_net"):
        assert (found[rule].learners[0].choice, found[rule].learners[0].best, found[rule].regret) == (None, None, 0)
        assert found[rule].share is None
    assert found["farthest"].learners[0].choice == "far"
    assert found["farthest"].regret == pytest.approx(0.05)


def test_no_guide_is_regretted_where_a_guide_gains():
    found = results(learner(candidate("near", 0.1, quality=0.2), candidate("far", 0.2, quality=0.2)))
    assert (found["Q_net"].learners[0].choice, found["Q_net"].share) == (None, 0)
    assert found["Q_net"].regret == pytest.approx(0.2)


def test_farthest_takes_only_candidates_of_the_line():
    found = results(
        learner(
            candidate("run", 0.3, quality=0.9), candidate("self", 0.1, distance=0), candidate("20", 0.2, distance=20)
        )
    )
    assert found["farthest"].learners[0].choice == "20"
    assert found["farthest"].rank_correlation == pytest.approx(1)
    assert found["farthest"].regret == pytest.approx(0.1)


def test_learner_itself_has_the_score_of_no_guide():
    itself = candidate("self", 0.1, variances={"kl_exp": 1.0})
    for rule in list_rules(["kl_exp"]):
        if rule.numerator != "distance":
            assert rule.score(itself) == pytest.approx(rule.score_no_guide(itself))


def test_rules_leave_out_candidates_without_variance():
    rule = Rule(name="Q/ess", kind="Q/V", numerator="Q", variance="ess")
    assert rule.score(candidate("file", 0.1)) is None
    # (9 * .2 + .5) / 10 = .23; / 1e300 is small, not an error.
    assert rule.score(candidate("a", 0.1, variances={"ess": 2.0})) == pytest.approx(0.115)
    assert rule.score(candidate("b", 0.1, variances={"ess": 1e300})) == pytest.approx(0.23e-300)


def test_results_are_means_over_learners():
    """Regrets 0 and .2; gains of the choices .3 and 0 of .3 and .2; correlations 1 and undefined."""
    found = results(
        learner(candidate("a", 0.3, quality=0.9), candidate("b", 0.1, quality=0.5)),
        learner(candidate("c", 0.2, quality=0.1), candidate("d", 0.1, quality=0.1)),
    )["Q_net"]
    assert found.regret == pytest.approx(0.1)
    assert found.share == pytest.approx(0.6)
    assert found.rank_correlation == pytest.approx(1)
    assert [one.choice for one in found.learners] == ["a", None]


def test_interval_of_the_regret_comes_from_the_resamples():
    """The choice is fixed by the score; in the resamples b is better than a by 0, .1 and .3."""
    candidates = (candidate("a", 0.3, quality=0.9), candidate("b", 0.1, quality=0.5))
    gains_BA = np.array([[0.3, 0.1], [0.3, 0.3], [0.2, 0.3], [0.1, 0.4]])
    (found,) = [
        one
        for one in evaluate_rules([LearnerGains(candidates=candidates, gains_BA=gains_BA)], list_rules([]))
        if one.rule == "Q"
    ]
    # The lower percentile is .005; an interval contains its estimate.
    high = np.percentile([0, 0.1, 0.3], 97.5)
    assert (found.regret, found.regret_low, found.regret_high) == pytest.approx((0, 0, high))
