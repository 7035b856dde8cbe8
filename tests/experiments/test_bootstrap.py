"""Figures of several seeds and their intervals, on numbers small enough for a hand."""

import numpy as np
import pytest

from npo_cli.experiments.bootstrap import (
    Resampler,
    SeedStatistics,
    area_weights,
    common_range,
    estimate_method,
    estimate_paired_difference,
    estimate_unpaired_difference,
    quarter_means,
    restrict_to_common_prompts,
    small_sample_factor,
)


def seed_of(number: int, values: list[float], *, names: str = "p") -> SeedStatistics:
    prompts = tuple(f"{names}{place}" for place in range(len(values)))
    return SeedStatistics(seed=number, prompts=prompts, values_PF=np.array([values]).T)


def bare(number: int, value: float) -> SeedStatistics:
    """Outcomes were not kept."""
    return SeedStatistics(seed=number, prompts=(), values_PF=np.array([[value]]))


def width(estimate) -> float:
    return estimate.high - estimate.low


HALF = [0.0, 1.0] * 50
"""Half of a hundred prompts solved: their mean has a standard error of 0.05."""


def test_area_is_the_mean_accuracy_by_the_trapezoid_rule():
    # 20 units: the ends count half a span each
    assert area_weights([0, 10, 20], low=0, high=20) == pytest.approx([0.25, 0.5, 0.25])
    # from 5 to 15: the first weighs a triangle of 0.5 x 5 / 2 in 10
    assert area_weights([0, 10, 20], low=5, high=15) == pytest.approx([0.125, 0.75, 0.125])


def test_area_counts_scout_cost_at_constant_accuracy():
    # 0.2 to 0.4 in 10, 20 at 0.4, 0.4 to 0.8 in 10: (3 + 8 + 6) / 40
    weights = area_weights([0, 10, 30, 40], low=0, high=40)
    assert weights @ [0.2, 0.4, 0.4, 0.8] == pytest.approx(0.425)


def test_common_range_is_the_overlap_of_all_curves():
    assert common_range([[0, 5, 30], [10, 40]]) == (10, 30)
    assert common_range([[0, 5], [5, 9]]) is None


def test_quarters_hold_their_own_steps():
    # of 8 steps: 1-2, 3-4, 5-6, 7-8; step 9 is beyond
    assert quarter_means({1: 1.0, 2: 3.0, 3: 5.0, 8: 7.0, 9: 99.0}, 8) == (2.0, 5.0, None, 7.0)


def test_bootstrap_of_one_seed_resamples_prompts():
    (found,) = estimate_method([seed_of(0, HALF)], Resampler())
    assert (found.value, found.num_used) == (0.5, 1)
    # 1.96 x 0.05 on both sides
    assert (found.low, found.high) == pytest.approx((0.402, 0.598), abs=0.015)


def test_seeds_on_the_same_prompts_do_not_average_the_prompts_away():
    alone = estimate_method([seed_of(0, HALF)], Resampler())[0]
    shared = estimate_method([seed_of(number, HALF) for number in range(8)], Resampler())[0]
    own = estimate_method([seed_of(number, HALF, names=f"s{number}-") for number in range(8)], Resampler())[0]
    assert width(shared) == pytest.approx(width(alone), rel=0.01)
    # 800 different prompts. Weights of seeds: sum of squares 1/8 + c^2 7/64, with c^2 = 8/7 (2.365/1.96)^2: 0.307
    assert width(own) / width(alone) == pytest.approx(0.307**0.5, abs=0.06)


def test_few_seeds_are_stretched_to_students_width():
    # sqrt(5/4) x 2.776 / 1.96; sqrt(2) x 12.706 / 1.96
    assert [small_sample_factor(num) for num in (1, 5, 2)] == pytest.approx([1.0, 1.5838, 9.168], abs=1e-3)
    # half of the resamples take one of the two twice: 0.01 off, stretched
    (found,) = estimate_method([seed_of(0, [0.49] * 100), seed_of(1, [0.51] * 100)], Resampler())
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - 0.09168, 0.5 + 0.09168), abs=1e-4)


def test_bootstrap_interval_stays_within_0_and_1():
    apart = [seed_of(0, [0.2] * 100), seed_of(1, [0.8] * 100)]
    (found,) = estimate_method(apart, Resampler())
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.0, 1.0))
    (signed,) = estimate_paired_difference(apart, [seed_of(0, [0.5] * 100), seed_of(1, [0.5] * 100)], Resampler())
    assert (signed.value, signed.low, signed.high) == pytest.approx((0.0, -1.0, 1.0))


def test_prompts_that_all_agree_are_no_certainty():
    (found,) = estimate_method([seed_of(0, [1.0] * 4)], Resampler())
    # Wilson's lower bound of 4 in 4: 4 / (4 + 1.96^2)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 0.5101, 1.0), abs=1e-4)


def test_bootstrap_without_results_per_prompt_resamples_seeds_only():
    (found,) = estimate_method([bare(0, 0.29), bare(1, 0.31)], Resampler())
    # 0.01 off, stretched as above
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3 - 0.09168, 0.3 + 0.09168), abs=1e-4)
    (alone,) = estimate_method([bare(0, 0.2)], Resampler())
    assert (alone.value, alone.low, alone.high) == (0.2, None, None)


def test_bootstrap_of_pairs_cancels_prompt_variance():
    # the method solves what the baseline solves, and 4 prompts more of 100
    better = [1.0] * 4 + HALF[4:]
    pairs = [[seed_of(number, values) for number in range(3)] for values in (better, HALF)]
    (found,) = estimate_paired_difference(*pairs, Resampler())
    # two of the first four were solved already: + 0.02, with an error of sqrt(0.02 x 0.98 / 100) = 0.014
    assert found.value == pytest.approx(0.02)
    assert width(found) == pytest.approx(2 * 1.96 * 0.014, rel=0.2)
    (loose,) = estimate_unpaired_difference(pairs[0], [seed_of(9, HALF, names="q")], Resampler())
    assert loose.value == pytest.approx(0.02)
    assert width(loose) > 4 * width(found)


def test_bootstrap_of_pairs_uses_common_prompts():
    mine = SeedStatistics(seed=0, prompts=("a", "b", "c"), values_PF=np.array([[1.0], [0.0], [0.5]]))
    theirs = SeedStatistics(seed=0, prompts=("c", "x", "a"), values_PF=np.array([[0.25], [1.0], [0.75]]))
    ours, others = restrict_to_common_prompts(mine, theirs)
    assert (ours.prompts, others.prompts) == (("a", "c"), ("a", "c"))
    assert (ours.values_PF[:, 0].tolist(), others.values_PF[:, 0].tolist()) == ([1.0, 0.5], [0.75, 0.25])
    # (0.25 + 0.25) / 2; without a common prompt the means are compared: 0.5 - 2/3
    assert estimate_paired_difference([mine], [theirs], Resampler())[0].value == pytest.approx(0.25)
    strange = SeedStatistics(seed=0, prompts=("x", "y", "z"), values_PF=theirs.values_PF)
    assert estimate_paired_difference([mine], [strange], Resampler())[0].value == pytest.approx(0.5 - 2 / 3)


def test_bootstrap_does_not_depend_on_the_order_of_seeds():
    method = [seed_of(0, HALF), seed_of(1, [0.25] * 100)]
    baseline = [seed_of(0, [0.1] * 100), seed_of(1, HALF)]
    assert estimate_paired_difference(method, baseline, Resampler()) == estimate_paired_difference(
        method[::-1], baseline, Resampler()
    )


def test_bootstrap_of_large_sets_is_deterministic(monkeypatch):
    seeds = [seed_of(number, HALF, names=f"s{number}-") for number in range(3)]
    kept = estimate_method(seeds, Resampler())
    monkeypatch.setattr("npo_cli.experiments.bootstrap.MAX_CACHED_COUNTS", 0)
    assert estimate_method(seeds, Resampler()) == kept
