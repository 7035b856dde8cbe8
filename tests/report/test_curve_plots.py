"""Curves of methods with their bands."""

import re
import warnings
from pathlib import Path

import pytest

from npo_cli.report.curve_plots import AXIS_LABELS, make_method_plots, plot_method_curves
from npo_cli.report.plotting import LEGEND_ROW, render_svg
from npo_cli.types.comparison import AXES, CurveBandPoint, Estimate


def band(method: str, *, axes=AXES) -> list[CurveBandPoint]:
    return [
        CurveBandPoint(
            method=method, axis=axis, cost=cost, accuracy=Estimate(value=cost / 100, low=cost / 200, high=cost / 50)
        )
        for axis in axes
        for cost in (0.0, 20.0, 40.0)
    ]


def labels(path: Path) -> list[str]:
    return re.findall(r"<!-- (.*) -->", path.read_text())


def test_curve_plot_has_a_panel_per_axis_and_names_every_method(tmp_path):
    plot_method_curves([*band("grpo"), *band("npo")], tmp_path / "c.svg", "two methods")
    found = labels(tmp_path / "c.svg")
    assert {*AXIS_LABELS.values(), "grpo", "npo", "two methods", "held-out accuracy"} <= set(found)
    # one band a method and an axis
    assert len(re.findall(r'id="FillBetweenPolyCollection_\d+"', (tmp_path / "c.svg").read_text())) == 10


def test_curve_plot_unknown_axis_has_no_panel(tmp_path):
    plot_method_curves(band("grpo", axes=("step", "tokens")), tmp_path / "c.svg", "")
    assert {"wall clock (s)", "optimizer updates, all costs"} & set(labels(tmp_path / "c.svg")) == set()


def test_curve_plot_draws_many_methods_and_curves_without_interval(tmp_path):
    bare = [
        CurveBandPoint(method=f"a{place}", axis="step", cost=1.0, accuracy=Estimate(value=0.5)) for place in range(9)
    ]
    plot_method_curves(bare, tmp_path / "c.svg", "")
    assert {f"a{place}" for place in range(9)} <= set(labels(tmp_path / "c.svg"))


def test_many_methods_have_no_bands_and_their_names_below_the_small_plot():
    methods = [f"method-{place}" for place in range(38)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib, about a panel without room
        (few,) = make_method_plots([point for one in methods[:8] for point in band(one, axes=("step",))], prefix="")
        (many,) = make_method_plots([point for one in methods for point in band(one, axes=("step",))], prefix="")
        drawn = [render_svg(plot).decode() for plot in (few, many)]
    assert [text.count('id="FillBetweenPolyCollection') for text in drawn] == [8, 0]
    assert many.height - few.height == pytest.approx(19 * LEGEND_ROW)
