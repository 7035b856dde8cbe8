import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.scoring.quality import (
    bootstrap_counts,
    cluster_interval,
    effective_trials,
    intraclass_correlation,
    jeffreys,
    pass_at_k,
    percentile_interval,
    smooth_quality,
    wilson,
)


def test_pass_at_4_of_two_correct_in_eight_is_11_of_14():
    # 1 - C(6,4)/C(8,4) = 1 - 15/70 = 11/14
    assert pass_at_k(8, 2, 4) == pytest.approx(11 / 14)
    assert pass_at_k(8, 2, 4) == pytest.approx(0.785714, abs=1e-6)


def test_pass_at_one_is_the_share_correct():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


def test_too_few_wrong_samples_to_fill_the_draw_make_success_certain():
    assert pass_at_k(8, 5, 4) == 1.0  # 3 wrong, 4 drawn
    assert pass_at_k(8, 0, 4) == 0.0


def test_drawing_more_than_was_sampled_means_drawing_everything():
    assert pass_at_k(4, 1, 100) == pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(4, 0, 100) == 0.0


@given(st.integers(1, 30), st.data())
def test_pass_at_k_is_a_share_that_grows_with_k(num_samples, data):
    num_correct = data.draw(st.integers(0, num_samples))
    rates = [pass_at_k(num_samples, num_correct, k) for k in range(1, num_samples + 1)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(late >= early - 1e-12 for early, late in itertools.pairwise(rates))


def test_wilson_agrees_with_the_published_values():
    assert wilson(3, 20) == pytest.approx((0.0524, 0.3604), abs=5e-5)
    assert wilson(0, 16) == pytest.approx((0.0, 0.1936), abs=5e-5)


def test_jeffreys_agrees_with_the_published_values():
    assert jeffreys(3, 20) == pytest.approx((0.0441, 0.3486), abs=5e-5)
    assert jeffreys(0, 16) == pytest.approx((0.0, 0.1432), abs=5e-5)


def test_jeffreys_bounds_are_exact_at_the_edges():
    assert jeffreys(0, 7)[0] == 0.0
    assert jeffreys(7, 7)[1] == 1.0
    # the two edges mirror each other
    assert jeffreys(7, 7)[0] == pytest.approx(1 - jeffreys(0, 7)[1])


def test_nothing_tried_is_nothing_known():
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 200), st.data())
def test_intervals_contain_the_share(trials, data):
    successes = data.draw(st.integers(0, trials))
    for low, high in (wilson(successes, trials), jeffreys(successes, trials)):
        assert 0 <= low <= successes / trials <= high <= 1


def test_smoothed_quality_is_never_zero():
    # (0 + 1/2)/(9 + 1) and (9 + 1/2)/(9 + 1)
    assert smooth_quality(0.0, 9) == 0.05
    assert smooth_quality(1.0, 9) == 0.95


def test_bootstrap_counts_start_with_the_data():
    counts_BP = bootstrap_counts(5, np.random.default_rng(0), 50)
    assert counts_BP.shape == (51, 5)
    assert counts_BP[0].tolist() == [1.0] * 5
    assert counts_BP.sum(axis=1).tolist() == [5.0] * 51


def test_cluster_interval_covers_two_standard_errors():
    # half the prompts solved: SE = sqrt(0.25/400) = 0.025, so 0.5 -+ 1.96 * 0.025
    values_P = np.array([0.0, 1.0] * 200)
    low, high = cluster_interval(values_P, np.random.default_rng(0), 4000)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.004)


def test_prompts_that_all_agree_get_an_interval_of_positive_width():
    assert cluster_interval(np.zeros(16), np.random.default_rng(0), 100) == wilson(0, 16)
    assert cluster_interval([1.0] * 16, np.random.default_rng(0), 100) == wilson(16, 16)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 5))
def test_cluster_interval_contains_the_mean(values, seed):
    values_P = np.array(values)
    low, high = cluster_interval(values_P, np.random.default_rng(seed), 40)
    assert low - 1e-9 <= values_P.mean() <= high + 1e-9


def test_interval_without_resamples_is_the_estimate():
    assert percentile_interval(np.array([0.3])) == (0.3, 0.3)


def test_interval_includes_the_estimate():
    low, high = percentile_interval(np.array([5.0] + [1.0, 2.0] * 50))
    assert (low, high) == (1.0, 5.0)


def test_samples_of_one_prompt_that_always_agree_are_worth_one_trial():
    correct_P, samples_P = np.array([8.0, 0.0, 8.0, 0.0]), np.full(4, 8.0)
    # MSW = 0, so ICC = 1 and M_eff = 4 * 8/(1 + 7)
    assert intraclass_correlation(correct_P, samples_P) == 1.0
    assert effective_trials(4, 8, 1.0) == 4.0


def test_prompts_that_do_not_differ_leave_every_sample_a_trial():
    # every prompt 4 of 8: MSB = 0, so the estimate is negative and cut to 0
    assert intraclass_correlation(np.full(6, 4.0), np.full(6, 8.0)) == 0.0
    assert effective_trials(6, 8, 0.0) == 48.0


def test_intraclass_correlation_by_hand():
    # two prompts of 2: shares 1, 1/2, mean 3/4. MSB = 2(1/16 + 1/16)/1 = 1/4, MSW = 2 * 1/4/(4 - 2) = 1/4, ICC = 0
    assert intraclass_correlation(np.array([2.0, 1.0]), np.array([2.0, 2.0])) == 0.0
    # shares 1, 0, 1/2: mean 1/2. MSB = 2(1/4 + 1/4)/2 = 1/2, MSW = (1/2)/3 = 1/6, ICC = (1/3)/(1/2 + 1/6) = 1/2
    assert intraclass_correlation(np.array([2.0, 0.0, 1.0]), np.full(3, 2.0)) == pytest.approx(0.5)


def test_interval_with_unknown_correlation_is_conservative():
    assert intraclass_correlation(np.array([3.0]), np.array([8.0])) == 1.0
    assert intraclass_correlation(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == 1.0
    assert intraclass_correlation(np.zeros(3), np.full(3, 8.0)) == 1.0
