import math

import pytest
import torch
from torch import tensor

from npo_cli.losses.inference_mismatch import correct_mismatch, measure_mismatch
from npo_cli.losses.types import LossStats, MismatchStats
from tests.losses.builders import mismatch_settings


def measured(log_weights: list[float]) -> MismatchStats:
    """Of one on-policy row with these log w, in float64."""
    behavior_NT = -tensor([log_weights]).double()
    everywhere_NT = torch.ones_like(behavior_NT, dtype=torch.bool)
    correction = correct_mismatch(behavior_NT * 0, behavior_NT, everywhere_NT, mismatch_settings("token_tis"))
    return MismatchStats.from_numbers(measure_mismatch(correction).tolist())


def test_mismatch_metrics_of_a_tenth_of_a_nat():
    found = measured([0.1]).metrics()
    # log w = 0.1: k1 = -0.1, k3 = e^0.1 - 1 - 0.1; w^2 = e^0.2
    assert found["mismatch/k1"] == pytest.approx(-0.1)
    assert found["mismatch/k3"] == pytest.approx(0.0051709, abs=1e-7)
    assert found["mismatch/chi2"] == pytest.approx(math.exp(0.2) - 1)
    assert found["mismatch/ess"] == pytest.approx(1.0)


def test_mismatch_ess_with_one_heavy_token():
    found = measured([0.0, 0.0, 0.0, math.log(5)]).metrics()
    # mean w = 2, mean w^2 = 28 / 4 = 7
    assert found["mismatch/weight_mean"] == pytest.approx(2.0)
    assert found["mismatch/weight_max"] == pytest.approx(5.0)
    assert found["mismatch/ess"] == pytest.approx(4 / 7)
    assert found["mismatch/chi2"] == pytest.approx(6.0)
    # 5 is over the cap of 2
    assert found["mismatch/clipped_fraction"] == 0.25


def test_mismatch_ess_of_symmetric_noise():
    found = measured([0.1, -0.1] * 50).metrics()
    # k1 = 0; k3 = cosh(0.1) - 1; mean w = cosh(0.1); mean w^2 = cosh(0.2)
    assert found["mismatch/k1"] == pytest.approx(0.0, abs=1e-12)
    assert found["mismatch/k3"] == pytest.approx(0.0050042, abs=1e-7)
    assert found["mismatch/weight_mean"] == pytest.approx(1.0050042, abs=1e-7)
    assert found["mismatch/ess"] == pytest.approx(1.0050042**2 / 1.0200668, abs=1e-6)


@pytest.mark.parametrize("value", [1.1e-7, 3e-6, 0.004, 0.5, 7.0, 19.99])
@pytest.mark.parametrize("sign", [1, -1])
def test_mismatch_percentile_is_at_most_one_bin_too_high(value, sign):
    # rank 99 of 100 is the smaller of the two far tokens; the larger one does not count
    found = measured([1e-8 * sign] * 98 + [value * sign, 20.0]).metrics()["mismatch/abs_log_w_p99"]
    assert value <= found <= min(20.0, value * 10 ** (1 / 20) * (1 + 1e-9))


def test_mismatch_percentile_is_the_99th():
    # below 1e-7 float32 cannot tell a log-probability from another: no distance
    assert measured([0.0] * 99 + [3.0]).metrics()["mismatch/abs_log_w_p99"] == 0.0
    assert measured([0.0] * 98 + [3.0] * 2).metrics()["mismatch/abs_log_w_p99"] >= 3.0
    assert measured([9.0]).metrics()["mismatch/abs_log_w_p99"] >= 9.0
    assert measured([25.0]).metrics()["mismatch/abs_log_w_p99"] == 20.0


def test_mismatch_metrics_of_nan_are_nan():
    found = measured([0.0, math.nan]).metrics()
    assert math.isnan(found["mismatch/weight_mean"])
    assert math.isnan(found["mismatch/abs_log_w_p99"])


def test_mismatch_stats_add_up():
    logs = [0.0, 0.3, -1.2, 2.5, -0.001, 4.0]
    whole = measured(logs).metrics()
    parts = (measured(logs[:1]) + measured(logs[1:4]) + measured(logs[4:])).metrics()
    assert parts == pytest.approx(whole)
    assert (MismatchStats() + measured(logs)).metrics() == whole
    assert MismatchStats().metrics() == {}


def test_loss_stats_add_up():
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
    # 4 of 40 on-policy tokens clipped; off-policy ratios 4 over 4 tokens, none of them with a gradient
    assert total.metrics() == {
        "clip_ratio/low": 0.0,
        "clip_ratio/high": 0.1,
        "inject/tokens_with_gradient": 0.0,
        "inject/ratio_mean": 1.0,
        "inject/ratio_min": 0.2,
        "inject/ratio_max": 2.0,
    }


def test_loss_stats_without_tokens_have_no_metrics():
    assert LossStats().metrics() == {}
    assert LossStats(on_policy_tokens=4.0, kl_sum=1.0, kl_tokens=4.0).metrics() == {
        "clip_ratio/low": 0.0,
        "clip_ratio/high": 0.0,
        "kl": 0.25,
    }
