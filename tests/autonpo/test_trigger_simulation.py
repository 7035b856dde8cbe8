"""Whole simulated runs with known triggers, through trigger and controller together."""

import math
from dataclasses import replace
from random import Random

import pytest

from npo_cli.autonpo.trigger import TriggerInput
from tests.autonpo.simulated_signals import autonpo_settings, curve, event_steps, first_step_of, run_until_trigger

SOME_NOISE = (0.05, 0.02)
"""Standard deviation of the batch accuracy (256 rollouts in groups of 8), and relative of the entropy."""


# No trigger


def count_triggers(noise_h, *, c_H, num_runs):
    """Runs of 300 steps that trigger on nothing: reward .4 + N(0, .05), entropy .3 (1 + N(0, noise_h))."""
    settings, triggers = autonpo_settings(trigger={"min_entropy_drop_se": c_H}), 0
    for seed in range(num_runs):
        signals = curve(lambda s: 0.4, lambda s: 0.3, last=300, noise=(0.05, noise_h), seed=seed)
        triggers += first_step_of("trigger", run_until_trigger(signals, settings=settings)) is not None
    return triggers


@pytest.mark.slow
def test_trigger_ignores_noise_in_a_thousand_runs():
    """Measured, triggers in runs of 300 steps:

    | c_H | noise .01 | .02 | .05 | .10 | .20 |
    |---|---|---|---|---|---|
    | 2 | 0 | 0 | 0.3 % | 21 % | 21 % |
    | 3 | 0 | 0 | 0.3 % | 1 % | 1 % |
    | 4 | 0 | 0 | under 0.1 % | under 0.1 % | under 0.1 % |

    The noise of h_{t-W} - h_t is .304 of the entropy's: a fall of d_H = 5 % is 8 of its units at .02, 3.3 at .05 and
    1.6 at .10, so from .05 on c_H decides. Averages of 10 steps make 26 separate looks in 260 steps:
    26 P(z > 2) = .6 before patience and stagnation, but 26 P(z > 4) = .0008.
    """
    assert count_triggers(0.05, c_H=4.0, num_runs=1000) == 0


@pytest.mark.slow
def test_trigger_needs_more_than_two_units_of_noise():
    # 21 % of 150 is 31; three standard deviations are 15
    assert 16 <= count_triggers(0.10, c_H=2.0, num_runs=150) <= 46
    assert count_triggers(0.10, c_H=4.0, num_runs=150) == 0


@pytest.mark.parametrize("seed", range(5))
def test_trigger_ignores_a_plateau_of_level_entropy(seed):
    # reward climbs to .6 by step 100 and stays; entropy stands still throughout
    signals = curve(lambda s: min(s, 100) * 0.006, lambda s: 0.3, last=400, noise=SOME_NOISE, seed=seed)
    assert event_steps(run_until_trigger(signals)) == [(41, "armed")]


@pytest.mark.parametrize("seed", range(5))
def test_trigger_ignores_a_rising_reward_with_falling_entropy(seed):
    # .004 a step is .08 in W = 20; the noise of the gain is .304 * .02 = .006
    signals = curve(lambda s: 0.1 + 0.004 * s, lambda s: 0.99**s, last=200, noise=(0.02, 0.02), seed=seed)
    assert event_steps(run_until_trigger(signals)) == [(41, "armed")]


# A plateau with falling entropy


def steps_until_5_percent(rate):
    """From the onset of a fall by `rate` a step until the average fell by 5 % over 20 steps, without noise.

    With q = 1 - rate, k steps after the onset the average stands at
    E(k) = lam^k + (1 - lam) q (q^k - lam^k)/(q - lam); before it, at 1.
    """
    q, lam = 1 - rate, 0.9

    def average(k):
        return lam**k + (1 - lam) * q * (q**k - lam**k) / (q - lam) if k > 0 else 1.0

    return next(k for k in range(1, 200) if 1 - average(k) / average(k - 20) >= 0.05)


@pytest.mark.parametrize(("rate", "delay"), [(0.003, 34), (0.01, 16)])
def test_trigger_fires_when_the_average_is_5_percent_down_for_5_steps(rate, delay):
    # 30 (12) steps until the average is 5 % down, and four more that say the same
    assert steps_until_5_percent(rate) + 4 == delay
    signals = curve(lambda s: 0.4, lambda s: 0.3 * (1 - rate) ** max(0, s - 100), last=200, noise=(0, 0), seed=0)
    assert event_steps(run_until_trigger(signals)) == [
        (41, "armed"),
        (100 + delay, "warning"),
        (100 + delay, "trigger"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "slowest"), [(0.003, 80), (0.01, 50)])
def test_trigger_is_delayed_by_noise_but_never_prevented(rate, slowest):
    """A streak breaks where the reward seems to rise (P(z > 1) = 16 % of looks, each some ten steps long)."""
    delays = []
    for seed in range(60):
        signals = curve(
            lambda s: 0.4, lambda s: 0.3 * (1 - rate) ** max(0, s - 100), last=200, noise=SOME_NOISE, seed=seed
        )
        step = first_step_of("trigger", run_until_trigger(signals))
        assert step is not None, seed
        delays.append(step - 100)
    expected = steps_until_5_percent(rate) + 4
    assert abs(sorted(delays)[30] - expected) <= 4
    assert expected - 15 <= min(delays) and max(delays) <= slowest


def test_trigger_waits_for_a_checkpoint():
    signals = curve(lambda s: 0.4, lambda s: 0.3 * 0.99 ** max(0, s - 100), last=200, noise=(0, 0), seed=0)
    found = event_steps(run_until_trigger(signals, save_every=10))
    assert found == [(41, "armed"), (116, "warning"), (120, "trigger")]


def test_trigger_warning_ends_if_the_reward_rises_before_the_next_checkpoint():
    # warned at 116 as above; from 118 on the reward climbs by .01 a step, checkpoints at 100 and 150
    signals = curve(
        lambda s: 0.4 + 0.01 * max(0, s - 117), lambda s: 0.3 * 0.99 ** max(0, s - 100), last=160, noise=(0, 0), seed=0
    )
    # m gains at once, and there was no noise to hide it
    found = event_steps(run_until_trigger(signals, save_every=50))
    assert found == [(41, "armed"), (116, "warning"), (118, "recovered")]


def test_trigger_streak_does_not_grow_in_the_warmup():
    # entropy falls from the first step: at 21 it is 5 % down, but step 41 is the first that counts
    signals = curve(lambda s: 0.4, lambda s: 0.3 * 0.99**s, last=60, noise=(0, 0), seed=0)
    assert event_steps(run_until_trigger(signals)) == [(41, "armed"), (45, "warning"), (45, "trigger")]
    unhurried = autonpo_settings(trigger={"warmup_steps": 0})
    assert event_steps(run_until_trigger(signals, settings=unhurried)) == [
        (1, "armed"),
        (25, "warning"),
        (25, "trigger"),
    ]


# Missing values


@pytest.mark.slow
def test_trigger_is_delayed_at_most_by_the_number_of_missing_values():
    whole = curve(lambda s: 0.4, lambda s: 0.3 * 0.99 ** max(0, s - 60), last=200, noise=SOME_NOISE, seed=3)
    expected = first_step_of("trigger", run_until_trigger(whole))
    for seed in range(20):
        lost = set(Random(seed).sample(range(41, expected + 1), 6))
        # one signal or the other
        hole = {step: {("reward", "entropy")[step % 2]: math.nan} for step in lost}
        holed = [replace(one, **hole.get(one.step, {})) for one in whole]
        found = first_step_of("trigger", run_until_trigger(holed))
        assert found is not None and abs(found - expected) <= 6, (seed, expected, found)


def test_trigger_never_fires_without_a_signal():
    signals = [TriggerInput(step=step, reward=math.nan, entropy=0.3 * 0.98**step) for step in range(1, 301)]
    assert event_steps(run_until_trigger(signals)) == [(41, "armed")]
