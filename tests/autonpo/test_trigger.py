"""The trigger: single readings checked by hand arithmetic, gaps, and missing values."""

import math
from random import Random

import pytest

from npo_cli.autonpo.trigger import Trigger, TriggerInput, error_of_difference, residual_stds
from npo_cli.config.autonpo import TriggerSettings

DEFAULTS = TriggerSettings()


def small(**changes):
    """Decay 0.5, window 2, c_r 1, d_H 0.05, c_H 2."""
    return TriggerSettings(**{"ema_decay": 0.5, "window": 2, "min_entropy_drop_se": 2.0} | changes)


SMALL = small()


def readings(rewards, entropies, *, settings=SMALL, steps=None):
    trigger = Trigger(settings)
    steps = steps or range(1, len(rewards) + 1)
    return [
        trigger.observe(TriggerInput(step=s, reward=r, entropy=h))
        for s, r, h in zip(steps, rewards, entropies, strict=True)
    ]


# One reading


def test_trigger_reading_equals_hand_arithmetic():
    seen = readings([0.2, 0.6, 0.4, 0.4], [0.8, 0.4, 0.4, 0.2])
    # lam = 1/2: m_2 = (.6 + .2/2)/1.5 = .7/1.5, m_4 = (.4 + .4/2 + .6/4 + .2/8)/1.875 = .775/1.875
    assert seen[1].reward_ema == pytest.approx(0.7 / 1.5)
    assert seen[3].reward_ema == pytest.approx(0.775 / 1.875)
    assert seen[3].reward_gain == pytest.approx(0.775 / 1.875 - 0.7 / 1.5)
    # line of .2 .6 .4 .4: S_yy .08, S_xy .2, S_xx 5, so s^2 = (.08 - .04/5)/2 = .036
    # two records apart: 2 (1/2)/(3/2) (1 - 1/4) = 1/2
    assert seen[3].reward_margin == pytest.approx(math.sqrt(0.036 / 2))
    # h_2 = (.4 + .8/2)/1.5 = .8/1.5, h_4 = (.2 + .4/2 + .4/4 + .8/8)/1.875 = .32: fell by 1 - .32 * 1.5/.8 = 40 %
    assert seen[3].entropy_ema == pytest.approx(0.32)
    assert seen[3].entropy_drop == pytest.approx(0.4)
    # line of .8 .4 .4 .2: S_yy .19, S_xy -.9, so s^2 = (.19 - .81/5)/2 = .014; 2 SE = 2 sqrt(.014/2) = .167
    assert seen[3].required_entropy_drop == pytest.approx(2 * math.sqrt(0.007) / (0.8 / 1.5))
    # at step 3 m gained .75/1.75 - .2 = .23; .2 .6 .4 have s^2 = .08 - .04/2 = .06, so the noise is sqrt(.06/2) = .17
    assert [one.verdict for one in seen] == ["short_history", "short_history", "rising", "stagnant"]


def test_trigger_ignores_an_entropy_drop_within_its_noise():
    # as above, but 3 SE = 47 % are required, and it fell by 40 %
    seen = readings([0.2, 0.6, 0.4, 0.4], [0.8, 0.4, 0.4, 0.2], settings=small(min_entropy_drop_se=3.0))
    assert seen[3].verdict == "entropy_level"


def test_trigger_sees_a_rise_only_beyond_its_noise():
    # 0 0 .4 .4: m_2 = 0, m_4 = .6/1.875 = .32; S_yy .16, S_xy .8, s^2 = (.16 - .64/5)/2 = .016, SE = sqrt(.008) = .089
    seen = readings([0.0, 0.0, 0.4, 0.4], [0.8, 0.4, 0.4, 0.2])
    assert (seen[3].verdict, seen[3].reward_gain) == ("rising", pytest.approx(0.32))
    # 4 SE = .358 would hide it
    hidden = readings([0.0, 0.0, 0.4, 0.4], [0.8, 0.4, 0.4, 0.2], settings=small(max_reward_gain_se=4.0))
    assert hidden[3].verdict == "stagnant"


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3])
def test_trigger_reads_a_constant_reward_as_stagnation_exactly(value):
    seen = readings([value] * 60, [0.99**k for k in range(60)], settings=DEFAULTS)[-1]
    assert (seen.reward_gain, seen.reward_margin, seen.verdict) == (0.0, 0.0, "stagnant")


def test_trigger_entropy_of_zero_cannot_fall():
    assert [one.verdict for one in readings([0.5] * 6, [0.0] * 6)][2:] == ["entropy_level"] * 4


def test_trigger_average_is_bias_corrected():
    # sum lam^i x_{k-i} (1 - lam)/(1 - lam^k)
    xs = [0.3, 0.1, 0.7, 0.4, 0.9]
    expected = sum(0.9**i * x for i, x in enumerate(reversed(xs))) * 0.1 / (1 - 0.9**5)
    assert readings(xs, xs, settings=DEFAULTS)[-1].reward_ema == pytest.approx(expected)


def test_trigger_error_of_difference_matches_simulated_averages():
    # lam = .9, 20 apart: sqrt(.2/1.9 * (1 - .9^20)) = .304
    assert error_of_difference(0.9, 20) == pytest.approx(0.3041, abs=1e-4)
    assert error_of_difference(0.0, 1) == pytest.approx(math.sqrt(2))
    gains = []
    for seed in range(400):
        noise = Random(seed)
        gains.append(readings([noise.gauss(0, 1) for _ in range(90)], [1.0] * 90, settings=DEFAULTS)[-1].reward_gain)
    # 400 draws: relative error 1/sqrt(800) = 3.5 %, three of them
    assert math.sqrt(sum(gain**2 for gain in gains) / 400) == pytest.approx(0.3041, rel=0.106)


def test_trigger_residual_std_excludes_the_trend():
    rewards = [0.2 + 0.004 * step for step in range(40)]
    assert list(residual_stds(range(40), rewards)) == pytest.approx([0.0], abs=1e-8)
    # +-.01 in turn around the trend: .01 sqrt(40/38), less the little that a line explains of it
    spread = next(residual_stds(range(40), [r + 0.01 * (-1) ** k for k, r in enumerate(rewards)]))
    assert spread == pytest.approx(0.01 * math.sqrt(40 / 38), rel=2e-3)


# Gaps


def test_trigger_compares_a_sparse_log_with_the_newest_record_a_window_old():
    settings = TriggerSettings(ema_decay=0.0)
    steps = [10, 20, 30, 35, 50]
    seen = readings([0.1, 0.2, 0.3, 0.35, 0.5], [1.0] * 5, settings=settings, steps=steps)
    assert [one.verdict for one in seen[:2]] == ["short_history"] * 2
    # 30 - 20 = 10; 35 - 20 = 15, newest before it 10; 50 - 20 = 30
    assert [one.reward_gain for one in seen[2:]] == pytest.approx([0.3 - 0.1, 0.35 - 0.1, 0.5 - 0.3])


def test_trigger_error_counts_records_not_steps():
    # every tenth step: two records in a window of 20, 2 * .1/1.9 * (1 - .9^2)
    rng = Random(0)
    rewards = [rng.random() for _ in range(50)]
    steps = range(10, 510, 10)
    seen = readings(rewards, [1.0] * 50, settings=DEFAULTS, steps=steps)[-1]
    spread = next(residual_stds(steps[10:], rewards[10:]))
    assert seen.reward_margin == pytest.approx(spread * math.sqrt(0.2 / 1.9 * (1 - 0.81)))


def test_trigger_steps_must_increase():
    trigger = Trigger(SMALL)
    trigger.observe(TriggerInput(step=3, reward=0.1, entropy=0.1))
    with pytest.raises(AssertionError):
        trigger.observe(TriggerInput(step=3, reward=0.1, entropy=0.1))


# Missing values


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, -math.inf])
def test_trigger_missing_value_leaves_both_averages_unchanged(hole):
    trigger = Trigger(SMALL)
    before = trigger.observe(TriggerInput(step=1, reward=0.2, entropy=0.8))
    for step, signal in ((2, {"reward": hole, "entropy": 0.1}), (3, {"reward": 0.9, "entropy": hole})):
        seen = trigger.observe(TriggerInput(step=step, **signal))
        assert (seen.verdict, seen.reward_ema, seen.entropy_ema) == ("no_signal", before.reward_ema, before.entropy_ema)
        assert None in (seen.reward, seen.entropy)
    # m = (.6 + .2/2)/1.5: the step before was step 1
    assert trigger.observe(TriggerInput(step=4, reward=0.6, entropy=0.4)).reward_ema == pytest.approx(0.7 / 1.5)


def test_trigger_reads_a_repeated_step_only_if_its_record_was_lost():
    """A power loss removed the record of the last step, or of none."""
    rng = Random(2)
    signals = [TriggerInput(step=step, reward=rng.random(), entropy=0.9**step) for step in range(1, 31)]
    straight = Trigger(DEFAULTS)
    expected = [straight.observe(signal) for signal in signals]
    for num_kept in (19, 20):
        again = Trigger(DEFAULTS)
        for signal in signals[:num_kept]:
            again.observe(signal)
        for signal in signals[17:20]:
            again.observe_if_new(signal)
        assert [again.observe(signal) for signal in signals[20:]] == expected[20:]
