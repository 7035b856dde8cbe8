"""Accuracies whose costs are compared: chosen from the curves."""

import pytest

from npo_cli.storage.cost_sums import choose_thresholds, cost_to_threshold, spread_thresholds
from npo_cli.types.costs import CurvePoint


def curve(*accuracies: float) -> list[CurvePoint]:
    return [
        CurvePoint(name="main", step=10 * place, total_steps=10 * place, total_tokens=100 * place, accuracy=accuracy)
        for place, accuracy in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("start", "best", "levels"),
    [
        (0.10, 0.93, (0.2, 0.6, 0.9)),
        (0.20, 0.96, (0.3, 0.6, 0.9)),
        (0.05, 0.50, (0.1, 0.3, 0.5)),
        (0.58, 0.61, (0.585, 0.595, 0.61)),
        (0.30, 0.30, ()),
        (0.40, 0.30, ()),
        (0.20, 0.2005, ()),
    ],
)
def test_thresholds_are_round_and_spread_over_the_range(start, best, levels):
    assert spread_thresholds(start, best) == levels


def test_thresholds_are_above_every_start_and_reached_by_one_branch():
    # Means of 3 evaluations: the first begins at (0.1 + 0.3) / 2 = 0.2, the second ends at (0.5 + 0.7) / 2 = 0.6.
    curves = [curve(0.1, 0.3, 0.3), curve(0.1, 0.1, 0.5, 0.7)]
    levels = choose_thresholds(curves)
    assert levels
    for level in levels:
        steps = [cost_to_threshold(points, level).step for points in curves]
        assert 0 not in steps
        assert any(steps)
    assert choose_thresholds([curve(0.5, 0.4)]) == ()
    assert choose_thresholds([[]]) == ()
