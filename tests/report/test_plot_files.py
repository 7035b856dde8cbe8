"""Pictures as files and as what was drawn into them."""

import re
import struct
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npo_cli.report.curve_plots import Curve, make_accuracy_plots, make_training_plots, moving_mean
from npo_cli.report.lineage_plot import make_lineage_plot
from npo_cli.report.plotting import Plot, render_svg, save_panels, save_plot
from npo_cli.report.score_plots import make_probe_plots, make_score_plots
from npo_cli.types.costs import CurvePoint
from npo_cli.types.rollouts import StepReport
from npo_cli.types.views import BranchSpan
from tests.report import autonpo_samples as auto_samples
from tests.report.autonpo_samples import intervention_transitions, make_transition
from tests.report.samples import FAR_SCORE, SCORE

MAIN = BranchSpan(
    branch="main",
    parent=None,
    fork_step=0,
    last_step=80,
    lineage_until=20,
    guide_cache=None,
    guide_step=None,
    guide_until=None,
)
LATE = replace(
    MAIN, branch="late", parent="main", fork_step=20, lineage_until=80, guide_cache="g", guide_step=60, guide_until=50
)


def drawn(picture: Plot) -> Axes:
    panel = Figure().subplots()
    picture.draw(panel)
    return panel


def labels(svg: bytes) -> list[str]:
    """Texts of an SVG, which matplotlib notes beside their outlines."""
    return re.findall(r"<!-- (.*) -->", svg.decode())


def make_curve(name: str, steps: list[int], *, extra: int = 0, until: int | None = None) -> Curve:
    points = tuple(
        CurvePoint(
            name=name,
            step=step,
            total_steps=step + extra,
            total_tokens=100 * (step + extra),
            total_seconds=0.5 * (step + extra),
            accuracy=step / 100,
        )
        for step in steps
    )
    return Curve(index=0, points=points, guide_until=until, is_fork=extra > 0)


def test_plot_file_is_deterministic_and_has_no_date(tmp_path):
    (picture, *_) = make_score_plots([SCORE, FAR_SCORE], prefix="x-")
    svg = render_svg(picture)
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<dc:date>" not in svg
    for folder in ("one", "two"):
        save_plot(picture, tmp_path / folder)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["x-quality-net.png", "x-quality-net.svg"]
    for name in ("x-quality-net.png", "x-quality-net.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "x-quality-net.svg").read_bytes() == svg
    # 4.6 x 3.7 inches at 150 dots an inch
    assert struct.unpack(">II", (tmp_path / "one" / "x-quality-net.png").read_bytes()[16:24]) == (690, 555)


def test_a_label_with_dollars_is_no_formula():
    names = [make_curve("a$\\frac{$", [0, 10]), make_curve("<b>&", [0, 10])]
    (picture, *_) = make_accuracy_plots(names, prefix="")
    assert {"a$\\frac{$", "&lt;b&gt;&amp;"} <= set(labels(render_svg(picture)))


def test_plot_time_axis_needs_times_of_every_method():
    timed = make_curve("a", [0, 10])
    still = replace(timed, points=tuple(replace(point, total_seconds=0.0) for point in timed.points))
    assert [one.name for one in make_accuracy_plots([timed], prefix="")] == [
        "accuracy-by-step",
        "accuracy-by-total-steps",
        "accuracy-by-tokens",
        "accuracy-by-clock",
    ]
    assert len(list(make_accuracy_plots([timed, still], prefix=""))) == 3
    # An arm that only stands at its start has spent nothing, and takes no axis away.
    assert len(list(make_accuracy_plots([timed, make_curve("b", [0])], prefix=""))) == 4


def test_plot_guide_band_ends_with_the_replay():
    by_step, by_steps, *_ = make_accuracy_plots([make_curve("late", [20, 40, 60], extra=30, until=50)], prefix="")
    band = drawn(by_step).lines[0].get_xydata().tolist()
    # between the evaluations at 40 and 60: halfway, 0.5
    assert band == [[20, 0.2], [40, 0.4], [50, pytest.approx(0.5)]]
    assert [x for x, _ in drawn(by_steps).lines[0].get_xydata().tolist()] == [50, 70, 80]


def test_a_fork_is_marked_and_a_first_branch_is_not():
    def diamonds(one: Curve) -> list[list[float]]:
        (picture, *_) = make_accuracy_plots([one], prefix="")
        return [line.get_xydata().tolist()[0] for line in drawn(picture).lines if line.get_marker() == "D"]

    assert diamonds(make_curve("late", [20, 40], extra=30)) == [[20, 0.2]]
    assert diamonds(make_curve("main", [0, 40])) == []


def test_a_moving_mean_uses_what_there_is_at_the_ends():
    # nine around each: of ten values the first sees five, the sixth nine
    means = moving_mean([float(value) for value in range(10)])
    assert means[0] == (0 + 1 + 2 + 3 + 4) / 5
    assert means[5] == (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9) / 9


def test_only_what_was_measured_is_drawn():
    metrics = {"reward": 0.5, "entropy": 0.25, "inject/slots": 0.0}
    reports = [StepReport(branch="main", step=step, metrics=metrics, timings={}) for step in (1, 2)]
    assert [one.name for one in make_training_plots(reports, [MAIN], prefix="r-")] == [
        "r-training-reward",
        "r-policy-entropy",
    ]
    with_injection = [*reports, StepReport(branch="late", step=21, metrics=metrics | {"inject/slots": 2.0}, timings={})]
    (*_, slots) = make_training_plots(with_injection, [MAIN, LATE], prefix="")
    panel = drawn(slots)
    # of each branch the single steps and their mean; late's are at step 21
    assert [line.get_xdata().tolist() for line in panel.lines if len(line.get_xdata()) == 1] == [[21], [21]]
    # shaded from the rollback to the last of its steps with a guide
    assert [(patch.get_x(), patch.get_width()) for patch in panel.patches] == [(20, 30)]


def test_plot_branch_tree_shows_kept_and_abandoned_steps():
    panel = drawn(
        make_lineage_plot(
            [MAIN, LATE],
            [*intervention_transitions(60, to=20), make_transition(70, "probe_rejected", "COOLDOWN")],
            prefix="",
        )
    )
    lines = [(line.get_linestyle(), line.get_xdata().tolist()) for line in panel.lines]
    assert lines[:2] == [("-", [0, 20]), (":", [20, 80])]
    # late was kept whole; its guide was at work until step 50
    assert ("-", [20, 80]) in lines
    assert ("-", [20, 50]) in lines
    (arrow,) = [text for text in panel.texts if getattr(text, "arrow_patch", None)]
    assert (arrow.xyann, arrow.xy) == ((60, 0), (20, 1))
    assert "guide g" in [text.get_text() for text in panel.texts]
    signs = {line.get_label(): line.get_xdata().tolist() for line in panel.lines if line.get_label()[0] != "_"}
    assert signs == {"warning": [58], "trigger, accepted": [60], "trigger, no lasting replay": [70]}


def test_q_v_and_s_have_their_intervals_and_the_chosen_ones_ring():
    quality, _, signal = make_score_plots([FAR_SCORE, SCORE], prefix="")
    panel = drawn(quality)
    # Q_net 0.2 in [0.15, 0.25] at distance 20
    ((low, high), *_) = [segment[:, 1].tolist() for segment in panel.collections[0].get_segments()]
    assert (low, high) == (pytest.approx(0.15), pytest.approx(0.25))
    assert [text.get_text() for text in panel.texts] == ["checkpoint:100"]
    assert drawn(signal).get_title(loc="center") == "S = Q_net / V, best in 75%"


def test_plot_probe_distances_omit_missing_values():
    net = {"quality_net": 0.2, "quality_net_low": 0.1, "quality_net_high": 0.3}
    lost = {name: value for name, value in auto_samples.SCORE.items() if name != "variance"} | net
    quality, variance, _ = make_probe_plots([lost, auto_samples.NEAR_SCORE | net], prefix="p-")
    assert [text.get_text() for text in drawn(quality).texts] == ["D* = 10"]
    points = drawn(variance).lines[0].get_xydata().tolist()
    assert points == [[10, 2.0]]
    assert variance.name == "p-variance"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_picture_of_several_plots_has_no_empty_panel(tmp_path, count):
    """Each panel that is seen has an x axis and a y axis."""
    path = tmp_path / "panels.svg"
    save_panels(list(make_score_plots([SCORE, FAR_SCORE], prefix=""))[:count], path, title="scores")
    assert path.read_text().count('id="matplotlib.axis_') == 2 * count
