import math

import numpy as np
import pytest

from npo_cli.scoring.weight_diagnostics import diagnose_weights, pareto_k, select_correct
from tests.scoring.samples import make_drifted_ratio


def test_equal_weights_are_healthy():
    health = diagnose_weights([make_drifted_ratio(-0.5, 5)] * 50)
    assert health.ess_fraction == pytest.approx(1.0)
    assert health.max_weight_share == pytest.approx(1 / 50)
    assert health.pareto_k is None
    assert not health.is_dominated


def test_weight_diagnostics_of_one_heavy_weight_in_four():
    # w = 1, 1, 1, 5: ESS/N = (64/28)/4 = 4/7, and the heavy one holds 5/8
    health = diagnose_weights([make_drifted_ratio(math.log(w), 3) for w in (1, 1, 1, 5)])
    assert health.ess_fraction == pytest.approx(4 / 7)
    assert health.max_weight_share == pytest.approx(5 / 8)
    assert health.is_dominated


def test_weight_diagnostics_with_a_small_effective_sample_size_are_dominated():
    # 2 of 100 samples weigh 1000, the rest 1: ESS/N = (2098^2/2000098)/100 = 0.022, yet neither holds more than half
    health = diagnose_weights([make_drifted_ratio(math.log(1000 if i < 2 else 1), 3) for i in range(100)])
    assert health.ess_fraction == pytest.approx(0.022, abs=5e-4)
    assert health.max_weight_share < 0.5
    assert health.is_dominated


def test_weight_diagnostics_without_samples_are_dominated():
    health = diagnose_weights([])
    assert (health.num_samples, health.ess_fraction, health.is_dominated) == (0, 0.0, True)


@pytest.mark.parametrize("shape", [0.3, 0.5, 0.9, 1.5])
def test_weight_diagnostics_estimate_the_shape_of_pareto_weights(shape):
    # w = u^-k on an even grid of u has a Pareto tail of shape k; the prior at 1/2 pulls a little
    u = (np.arange(4000) + 0.5) / 4000
    assert pareto_k(-shape * np.log(u)) == pytest.approx(shape, abs=0.12)


def test_bounded_weights_have_no_heavy_tail():
    # uniform weights end abruptly: their shape is -1
    assert pareto_k(np.log((np.arange(4000) + 0.5) / 4000)) < 0


def test_weight_diagnostics_with_a_heavy_tail_alone_are_dominated():
    u = (np.arange(3000) + 0.5) / 3000
    health = diagnose_weights([make_drifted_ratio(float(-0.8 * math.log(x)), 3) for x in u])
    assert health.pareto_k > 0.7
    assert health.is_dominated


def test_too_few_weights_have_no_tail_to_fit():
    assert pareto_k(np.linspace(-1, 1, 24)) is None  # 24/5 < 5
    assert pareto_k(np.linspace(-1, 1, 25)) is not None
    assert pareto_k(np.full(1000, 0.3)) is None


def test_select_correct_keeps_correct_samples_only():
    right, wrong = make_drifted_ratio(0.1, 3, correct=True), make_drifted_ratio(0.2, 3)
    assert select_correct([right, wrong]) == (right,)
