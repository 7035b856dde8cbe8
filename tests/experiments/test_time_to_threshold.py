"""Costs of reaching a threshold, with seeds that never did."""

import numpy as np
import pytest
from scipy.stats import CensoredData, ecdf

from npo_cli.experiments.time_to_threshold import (
    SeedTimeToThreshold,
    mean_with_interval,
    restricted_mean,
    restricted_ratio,
    uncensored_ratio,
)


def seeds_with_costs(*costs: float | None, end: float = 40.0) -> list[SeedTimeToThreshold]:
    return [SeedTimeToThreshold(seed=seed, cost=cost, total_cost=end) for seed, cost in enumerate(costs)]


def test_time_to_threshold_censored_seed_counts_up_to_the_horizon():
    # (10 + 40 + 30) / 3
    assert restricted_mean(seeds_with_costs(10, None, 30), 40) == pytest.approx(80 / 3)
    # one that arrived beyond the horizon counts no more than the horizon
    assert restricted_mean(seeds_with_costs(10, None, 30), 20) == pytest.approx(50 / 3)
    assert [one.lower_bound for one in seeds_with_costs(10, None, 30)] == [10, 40, 30]


def test_time_to_threshold_horizon_beyond_a_run_is_an_error():
    with pytest.raises(AssertionError, match="ended before"):
        restricted_mean(seeds_with_costs(10, None), 41)


def test_restricted_mean_is_the_area_under_the_kaplan_meier_curve():
    survival = ecdf(CensoredData(uncensored=[10.0, 30.0], right=[40.0, 40.0])).sf
    grid = np.linspace(0, 40, 40001)
    area = np.trapezoid(survival.evaluate(grid), grid)
    assert restricted_mean(seeds_with_costs(10, None, 30, None), 40) == pytest.approx(area, abs=0.01)


def test_students_interval_of_two_values():
    # mean 3, standard deviation sqrt 2, over sqrt 2: 1; t(1) = 12.706
    found = mean_with_interval([2.0, 4.0], of=3)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - 12.706, 3 + 12.706), abs=1e-3)
    assert (found.num_used, found.num_total) == (2, 3)
    assert (mean_with_interval([2.0], of=1).low, mean_with_interval([2.0], of=1).high) == (None, None)


def test_ratios_rest_on_pairs_in_which_both_arrived_and_say_so():
    # 20/10 and 30/10; the third pair has no method, the fourth no baseline, the fifth no cost
    found = uncensored_ratio(seeds_with_costs(10, 10, None, 5, 0), seeds_with_costs(20, 30, 10, None, 10))
    assert found is not None
    # sqrt(2 * 3)
    assert (found.value, found.num_used, found.num_total) == (pytest.approx(6**0.5), 2, 5)
    assert uncensored_ratio(seeds_with_costs(None), seeds_with_costs(10)) is None


def test_ratio_of_means_is_geometric_with_the_interval_of_the_log():
    # 10/20 and 40/20: equal costs over the seeds; the arithmetic mean of the ratios would be 1.25 either way
    found, inverse = (
        uncensored_ratio(seeds_with_costs(20, 20), seeds_with_costs(10, 40)),
        uncensored_ratio(seeds_with_costs(10, 40), seeds_with_costs(20, 20)),
    )
    assert found is not None and inverse is not None
    assert (found.value, inverse.value) == pytest.approx((1.0, 1.0))
    # log 2 and -log 2: standard deviation sqrt(2) log 2, over sqrt 2; t(1) = 12.706
    assert (found.low, found.high) == pytest.approx((2**-12.706, 2**12.706), rel=1e-3)


def test_restricted_mean_ratio_uses_every_seed():
    # baseline (20 + 40) / 2 = 30, method (10 + 20) / 2 = 15; both pairs say 2
    found = restricted_ratio(seeds_with_costs(10, 20), seeds_with_costs(20, None), horizon=40)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_pairs_that_disagree_give_the_restricted_ratio_students_interval():
    # 30/10 = 3; u = (20 - 30)/10, 0 and (40 - 30)/10: standard deviation 1, over sqrt 3; t(2) = 4.303
    found = restricted_ratio(seeds_with_costs(10, 10, 10), seeds_with_costs(20, 30, None), horizon=40)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - 2.484, 3 + 2.484), abs=1e-3)


def test_speedup_interval_is_never_below_zero():
    # two pairs: 30/10 = 3, standard deviation sqrt 2, over sqrt 2; t(1) = 12.706
    found = restricted_ratio(seeds_with_costs(10, 10), seeds_with_costs(20, None), horizon=40)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 0.0, 3 + 12.706), abs=1e-3)


def test_restricted_mean_ratio_uses_common_seeds():
    # seed 0 alone is common: 20/10; the baseline's seeds 1 and 2 have no partner
    found = restricted_ratio(seeds_with_costs(10), seeds_with_costs(20, 40, 40), horizon=40)
    assert found is not None
    assert (found.value, found.low, found.num_used, found.num_total) == (2.0, None, 1, 3)
    # none in common: (20 + 40) / 2 over 10, and nothing to pair
    other_seed = [SeedTimeToThreshold(seed=9, cost=10, total_cost=40)]
    apart = restricted_ratio(other_seed, seeds_with_costs(20, None), horizon=40)
    assert apart is not None
    assert (apart.value, apart.low, apart.num_used, apart.num_total) == (3.0, None, 0, 2)


def test_speedup_without_a_reached_threshold_or_cost_is_absent():
    assert restricted_ratio(seeds_with_costs(None), seeds_with_costs(None), horizon=40) is None
    assert restricted_ratio(seeds_with_costs(0), seeds_with_costs(10), horizon=40) is None
