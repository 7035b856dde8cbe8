import pytest

from npo_cli.errors import NpoError
from npo_cli.losses.types import LossStats
from tests.losses.builders import loss_knobs


def test_stats_of_micro_batches_add_up():
    first = LossStats(
        on_policy_tokens=10.0,
        clipped_high=1.0,
        off_policy_tokens=2.0,
        off_policy_tokens_with_logps=2.0,
        ratio_sum=3.0,
        ratio_min=1.0,
        ratio_max=2.0,
    )
    second = LossStats(
        on_policy_tokens=30.0,
        clipped_high=3.0,
        off_policy_tokens=2.0,
        off_policy_tokens_with_logps=2.0,
        ratio_sum=1.0,
        ratio_min=0.2,
        ratio_max=0.8,
    )
    total = sum([first, second], start=LossStats())
    # 4 of 40 own tokens clipped; foreign ratios 4 over 4 tokens, none of them with a gradient
    assert total.metrics() == {
        "clip_ratio/low": 0.0,
        "clip_ratio/high": 0.1,
        "inject/kept_share": 0.0,
        "inject/ratio_mean": 1.0,
        "inject/ratio_min": 0.2,
        "inject/ratio_max": 2.0,
    }


def test_nothing_measured_is_nothing_said():
    assert LossStats().metrics() == {}
    assert LossStats(on_policy_tokens=4.0, kl_sum=1.0, kl_tokens=4.0).metrics() == {
        "clip_ratio/low": 0.0,
        "clip_ratio/high": 0.0,
        "kl": 0.25,
    }


def test_a_delta_inside_the_clip_range_is_refused_by_name():
    with pytest.raises(NpoError) as caught:
        loss_knobs(delta=1.1, clip_high=0.2)
    assert caught.value.message == "loss.delta must be above 1 + loss.clip_high = 1.2, got 1.1"
    assert caught.value.hint == "set loss.delta above 1.2, or to null to switch it off"
