"""H(a): steps from an accuracy to the target, unguided run minus replayed branch."""

import pytest

from npo_cli.scoring.hysteresis import Arrivals, SeedHysteresis, estimate_hysteresis, seed_hysteresis


def arrivals(accuracy: int | None, target: int | None, last: int = 200) -> Arrivals:
    return Arrivals(accuracy=accuracy, target=target, last=last)


def test_hysteresis_is_the_difference_of_the_ways_to_the_target():
    # unguided: .75 at 90, .9 at 170; replayed from 40: .75 at 60, .9 at 120: 80 - 60
    assert seed_hysteresis(arrivals(90, 170), arrivals(60, 120), fork_step=40) == SeedHysteresis(steps=20)


def test_hysteresis_of_a_censored_run_is_a_bound():
    # The unguided run trained 200 - 90 = 110 steps more and was not there; the replay needed 60.
    found = seed_hysteresis(arrivals(90, None), arrivals(60, 120), fork_step=40)
    assert found == SeedHysteresis(steps=50, bound="at least")
    # The replay did 150 - 60 = 90 steps in vain; the unguided run needed 80.
    found = seed_hysteresis(arrivals(90, 170), arrivals(60, None, last=150), fork_step=40)
    assert found == SeedHysteresis(steps=-10, bound="at most")
    assert seed_hysteresis(arrivals(90, None), arrivals(60, None), fork_step=40) is None


def test_hysteresis_is_unknown_where_the_learner_had_the_accuracy_before_the_replay():
    assert seed_hysteresis(arrivals(30, 170), arrivals(30, 120), fork_step=40) is None
    assert seed_hysteresis(arrivals(None, None), arrivals(60, 120), fork_step=40) is None


def test_hysteresis_over_seeds_has_students_interval_of_the_exact_ones():
    # mean 20, standard deviation 10, over sqrt 3; t(2) = 4.303: 24.8
    estimate, bound = estimate_hysteresis([SeedHysteresis(steps=steps) for steps in (10, 20, 30)])
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((20, 20 - 24.84, 20 + 24.84), abs=0.01)
    assert (bound, estimate.num_used, estimate.num_total) == ("exact", 3, 3)


def test_hysteresis_over_seeds_is_a_bound_where_some_are():
    more, less = SeedHysteresis(steps=40, bound="at least"), SeedHysteresis(steps=-10, bound="at most")
    # (20 + 40) / 2
    estimate, bound = estimate_hysteresis([SeedHysteresis(steps=20), more, None])
    assert (estimate.value, estimate.low, bound, estimate.num_used, estimate.num_total) == (30, None, "at least", 2, 3)
    # Bounds on both sides bound nothing: the exact one is left.
    estimate, bound = estimate_hysteresis([SeedHysteresis(steps=20), more, less])
    assert (estimate.value, bound, estimate.num_used, estimate.num_total) == (20, "exact", 1, 3)
    assert estimate_hysteresis([None, more, less]) is None
