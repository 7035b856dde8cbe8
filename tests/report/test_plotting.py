import errno
import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.report.plotting import format_compact, plot_accuracy_curves
from npo_cli.types.costs import CurvePoint


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def points(method: str, *, extra: int) -> list[CurvePoint]:
    return [
        CurvePoint(
            name=method, step=step, total_steps=step + extra, total_tokens=1000 * (step + extra), accuracy=step / 100
        )
        for step in (0, 50, 90)
    ]


def test_comparison_plot_is_one_wide_figure(tmp_path):
    path = tmp_path / "new" / "cmp.png"
    plot_accuracy_curves([*points("GRPO", extra=0), *points("NPO", extra=40)], path, "two methods")
    # 13 x 4.6 inches at 150 dots an inch
    assert png_size(path) == (1950, 690)


def labels(path: Path) -> list[str]:
    """Texts of an SVG, which matplotlib notes beside their outlines."""
    return re.findall(r"<!-- (.*) -->", path.read_text())


def test_comparison_plot_has_a_time_panel_if_every_method_has_times(tmp_path):
    slow, fast = points("GRPO", extra=0), points("NPO", extra=40)
    timed = [[replace(point, total_seconds=2.5 * point.total_steps) for point in method] for method in (slow, fast)]
    plot_accuracy_curves([*timed[0], *timed[1]], tmp_path / "both.svg", "")
    plot_accuracy_curves([*slow, *timed[1]], tmp_path / "one.svg", "")
    assert labels(tmp_path / "both.svg").count("wall clock (s)") == 1
    assert labels(tmp_path / "one.svg").count("wall clock (s)") == 0
    # 2.5 x (90 + 40) = 325 seconds: the axis goes beyond 300
    assert "300" in labels(tmp_path / "both.svg")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_comparison_plot_is_deterministic_and_whole_or_absent(tmp_path, monkeypatch, kind):
    for name in ("a", "b"):
        plot_accuracy_curves(points("GRPO", extra=0), tmp_path / f"{name}.{kind}", "one method")
    before = (tmp_path / f"a.{kind}").read_bytes()
    assert before == (tmp_path / f"b.{kind}").read_bytes()

    def fail(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunFailed, match="no room left"):
        plot_accuracy_curves(points("NPO", extra=5), tmp_path / f"a.{kind}", "another one")
    assert (tmp_path / f"a.{kind}").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_comparison_plot_draws_more_methods_than_colors(tmp_path):
    every = [point for number in range(9) for point in points(f"method {number}", extra=number)]
    plot_accuracy_curves(every, tmp_path / "many.svg", "nine methods")
    assert (tmp_path / "many.svg").read_text().count("<!-- method 8 -->") == 1


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path):
    import matplotlib

    before = matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]
    plot_accuracy_curves(points("GRPO", extra=0), tmp_path / "a.png", "")
    assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]) == before


def test_plot_without_matplotlib_has_an_install_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NpoError) as caught:
        plot_accuracy_curves(points("GRPO", extra=0), tmp_path / "a.png", "")
    assert caught.value.hint == "pip install matplotlib"


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (300, "300"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G")])
def test_axis_counts_are_short(value, text):
    assert format_compact(value) == text
