"""The group-sequential test of a probe: looks, their error, conditional power."""

import numpy as np
import pytest

from npo_cli.autonpo.sequential_test import ALPHA, Look, conditional_power, critical_value, plan_looks


@pytest.mark.parametrize(
    ("num_prompts", "sizes"),
    [(256, [64, 128, 192, 256]), (255, [64, 128, 192, 255]), (100, [34, 67, 100]), (63, [63]), (8, [8]), (0, [0])],
)
def test_looks_divide_the_probe_into_parts_of_32_prompts_or_more(num_prompts, sizes):
    assert [look.num_prompts for look in plan_looks(num_prompts)] == sizes
    assert [look.is_last for look in plan_looks(num_prompts)] == [False] * (len(sizes) - 1) + [True]


def test_looks_spend_the_whole_error_and_more_of_it_late():
    # alpha (k^2 - (k-1)^2)/16 = alpha (1, 3, 5, 7)/16
    levels = [look.level for look in plan_looks(256)]
    assert levels == pytest.approx([ALPHA * part / 16 for part in (1, 3, 5, 7)])
    assert sum(levels) == pytest.approx(0.025)
    assert {look.last_level for look in plan_looks(256)} == {levels[-1]}
    assert [look.level for look in plan_looks(40)] == [0.025]
    assert critical_value(0.025) == pytest.approx(1.959964, abs=1e-6)


def test_conditional_power_is_the_share_of_simulated_continuations():
    """SE .1 at a quarter of the prompts and estimate .15: the final estimate is .15 with the noise of the rest."""
    look = Look(num_prompts=64, share=0.25, last_level=0.025)
    rng = np.random.default_rng(0)
    # one prompt has sd .1 sqrt(64) = .8; the rest is 192 prompts around .15
    rest = 0.15 + 0.8 / np.sqrt(192) * rng.standard_normal(200_000)
    final = 0.25 * 0.15 + 0.75 * rest
    share = np.mean(final - 1.959964 * 0.8 / np.sqrt(256) > 0)
    assert conditional_power(0.15, 0.1, limit=0.0, look=look) == pytest.approx(share, abs=0.005)
    # moved with the limit
    assert conditional_power(0.35, 0.1, limit=0.2, look=look) == pytest.approx(share, abs=0.005)


def test_conditional_power_without_error_says_whether_the_limit_is_passed():
    look = Look(num_prompts=64, share=0.25)
    assert [conditional_power(each, 0.0, limit=0.1, look=look) for each in (0.1, 0.11)] == [0.0, 1.0]
