"""The plot of a calibration: measured gain against the score of each selection rule."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.report.plotting import MUTED, get_line_style, open_figure
from npo_cli.types.calibration import CandidateGain, RuleResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 5


def plot_calibration(
    candidates: Sequence[CandidateGain], results: Sequence[RuleResult], path: Path, *, title: str
) -> None:
    """One panel per rule, with its rank correlation: a point per candidate with the 95 % interval of its gain, a colour
    per learner."""
    num_rows = math.ceil(len(results) / COLUMNS)
    with open_figure(path, title=title, height=1.0 + 2.3 * num_rows) as figure:
        panels = figure.subplots(num_rows, COLUMNS, sharey=True, squeeze=False).flat
        for result, panel in zip(results, panels, strict=False):
            _draw_rule(panel, candidates, result)
        for panel in list(panels)[len(results) :]:
            panel.set_axis_off()
        figure.supylabel("gain in held-out accuracy", fontsize=11)
        lines, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=6, frameon=False)


def _draw_rule(panel: "Axes", candidates: Sequence[CandidateGain], result: RuleResult) -> None:
    steps = dict.fromkeys(one.learner_step for one in candidates)
    scores = []
    for place, step in enumerate(steps):
        style = get_line_style(place)
        known = [
            (score, one)
            for one in candidates
            if one.learner_step == step and (score := one.scores.get(result.rule)) is not None
        ]
        scores += [score for score, _ in known]
        panel.errorbar(
            [score for score, _ in known],
            [one.gain for _, one in known],
            yerr=[[one.gain - one.gain_low for _, one in known], [one.gain_high - one.gain for _, one in known]],
            color=style.colour,
            ecolor=f"{style.colour}88",
            fmt=style.marker,
            ms=5,
            capsize=2,
            label=f"learner at step {step}",
        )
    # A score divided by a V of many orders of magnitude: ratios are what the eye should compare.
    if scores and min(scores) > 0 and max(scores) > 1000 * min(scores):
        panel.set_xscale("log")
    else:
        panel.locator_params(axis="x", nbins=4)
    panel.axhline(0, color=MUTED, lw=0.8)
    correlation = "" if result.rank_correlation is None else f": {result.rank_correlation:.2f}"
    panel.set_title(f"{result.rule}{correlation}", loc="left", fontsize=8)
    panel.tick_params(labelsize=8)
