"""Plots of Q_net, V and S = Q_net / V: of guide candidates for a learner, and of the rollback distances of a probe."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npo_cli.report.plotting import COLOURS, MUTED, Plot, fit_limits, open_figure
from npo_cli.report.tables_scores import sort_candidates
from npo_cli.types.scores import CandidateScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORE_PANELS = (
    ("quality_net", "Q_net", COLOURS[2]),
    ("variance", "V", COLOURS[1]),
    ("signal", "S = Q_net / V", COLOURS[0]),
)
SCORE_PLOT_WIDTH = 4.6
MAX_NAME_CHARS = 28
ValueWithInterval = tuple[float, float, float]
"""Value, low, high."""
LOG_SCALE_RATIO = 20
"""Ratio of the largest to the smallest V from which its axis is logarithmic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalEstimate:
    """An estimate at a distance in steps."""

    distance: int
    value: float
    low: float
    high: float
    selected_label: str | None = None
    """Label of the selected one; None for the others."""


EstimatesGetter = Callable[[str], Sequence[IntervalEstimate]]
"""The estimates of quality_net, variance or signal, by that name."""


def make_score_plots(scores: Sequence[CandidateScore], *, prefix: str) -> Iterator[Plot]:
    """Q_net, V and S of the candidates on the learner's line by distance; none if there is no such candidate."""
    ordered = sorted((one for one in scores if one.distance is not None), key=lambda one: one.distance or 0)
    if not ordered:
        return
    kinds = {"quality_net": ordered[0].quality_kind, "variance": ordered[0].variance_kind}
    best = "".join(f"best in {one.p_best:.0%}" for one in ordered if one.is_selected)

    def estimates(name: str) -> list[IntervalEstimate]:
        return [
            IntervalEstimate(
                distance=one.distance or 0,
                value=getattr(one, name),
                low=_or_value(getattr(one, f"{name}_low"), getattr(one, name)),
                high=_or_value(getattr(one, f"{name}_high"), getattr(one, name)),
                selected_label=one.candidate if one.is_selected else None,
            )
            for one in ordered
            if getattr(one, name) is not None
        ]

    axis = "training steps ahead of the learner"
    yield from _score_plots(estimates, kinds | {"signal": best}, prefix=prefix, axis=axis)


def _or_value(bound: float | None, value: float) -> float:
    """A bound of an interval; the value where there is no interval."""
    return value if bound is None else bound


def make_probe_plots(scores: Sequence[Mapping[str, Any]], *, prefix: str) -> Iterator[Plot]:
    """The same of the rollback distances of one probe, from its evidence; an absent figure was not finite."""
    ordered = sorted(scores, key=lambda one: one["distance"])
    best = "".join(f"best in {one['p_best']:.0%}" for one in ordered if one.get("is_selected") and "p_best" in one)
    kinds = {"quality_net": "pass rate", "variance": str(ordered[0].get("variance_kind", "")), "signal": best}

    def estimates(name: str) -> list[IntervalEstimate]:
        return [
            IntervalEstimate(
                distance=one["distance"],
                value=one.get(name, math.nan),
                low=one.get(f"{name}_low", math.nan),
                high=one.get(f"{name}_high", math.nan),
                selected_label=f"D* = {one['distance']}" if one.get("is_selected") else None,
            )
            for one in ordered
        ]

    yield from _score_plots(estimates, kinds, prefix=prefix, axis="rollback distance D")


def _score_plots(estimates: EstimatesGetter, kinds: Mapping[str, str], *, prefix: str, axis: str) -> Iterator[Plot]:
    for name, letter, colour in SCORE_PANELS:
        title = ", ".join(filter(None, (letter, kinds[name])))
        values = "; ".join(f"{one.value:.3g} at {one.distance}" for one in estimates(name))
        draw = partial(
            _draw, estimates=estimates(name), title=title, axis=axis, colour=colour, is_variance=name == "variance"
        )
        yield Plot(
            name=f"{prefix}{name.replace('_', '-')}",
            alt_text=f"{title} by {axis}: {values}",
            draw=draw,
            width=SCORE_PLOT_WIDTH,
        )


def _draw(
    panel: "Axes", *, estimates: Sequence[IntervalEstimate], title: str, axis: str, colour: str, is_variance: bool
) -> None:
    """A line with intervals, the selected estimate ringed; values that are not finite are left out."""
    panel.set_title(title, color=colour)
    panel.set_xlabel(axis)
    known = [one for one in estimates if all(map(math.isfinite, (one.value, one.low, one.high)))]
    if not known:
        panel.text(0.5, 0.5, "could not be estimated", transform=panel.transAxes, ha="center", color=MUTED)
        return
    distances, values, lows, highs = zip(*((one.distance, one.value, one.low, one.high) for one in known), strict=True)
    bars = _error_bars(values, lows, highs)
    panel.errorbar(distances, values, yerr=bars, color=colour, ecolor=f"{colour}88", fmt="o-", lw=2, ms=5, capsize=3)
    if is_variance and _spans_magnitudes(values, lows):
        panel.set_yscale("log")
    else:
        panel.set_ylim(fit_limits([*values, *lows, *highs] if is_variance else [0.0, *values, *lows, *highs]))
    panel.set_xlim(0, 1.05 * max(distances) or 1)
    panel.xaxis.get_major_locator().set_params(integer=True)
    for one in known:
        if one.selected_label is not None:
            _draw_ring(panel, (one.distance, one.value), colour)
            _draw_label(panel, (one.distance, one.value), one.selected_label)


def _error_bars(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """Lengths below and above; 0 where a resampled interval leaves its estimate outside."""
    below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
    return [below, [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]]


def _draw_ring(panel: "Axes", at: tuple[float, float], colour: str) -> None:
    panel.plot(*at, marker="o", ms=14, color=colour, fillstyle="none", mew=2, clip_on=False)


def _draw_label(panel: "Axes", at: tuple[float, float], label: str) -> None:
    """Beside a point, on the sides with more space: never over the title or outside."""
    across, up = panel.transAxes.inverted().transform(panel.transData.transform(at))
    side, ha = (12, "left") if across < 0.5 else (-12, "right")
    panel.annotate(label, at, xytext=(side, 9 if up < 0.5 else -18), textcoords="offset points", ha=ha)


def _spans_magnitudes(values: Sequence[float], lows: Sequence[float]) -> bool:
    return min(*values, *lows) > 0 and max(values) > LOG_SCALE_RATIO * min(values)


def plot_scores(scores: Sequence[CandidateScore], path: Path, title: str = "") -> None:
    """A row per candidate, a panel each for Q_net, V and S = Q_net / V with 95 % intervals; a ring marks the choice."""
    ordered = list(reversed(sort_candidates(scores)))
    best = "".join(f", {_short(one.candidate)} best in {one.p_best:.0%}" for one in ordered if one.is_selected)
    panels = (
        (
            "Q_net, prompts solved",
            COLOURS[2],
            [_all(one.quality_net, one.quality_net_low, one.quality_net_high) for one in ordered],
        ),
        (
            f"V, {ordered[0].variance_kind}",
            COLOURS[1],
            [_all(one.variance, one.variance_low, one.variance_high) for one in ordered],
        ),
        (f"S = Q_net / V{best}", COLOURS[0], [_all(one.signal, one.signal_low, one.signal_high) for one in ordered]),
    )
    with open_figure(path, title=title, height=1.9 + 0.42 * len(ordered)) as figure:
        axes = figure.subplots(1, len(panels), sharey=True)
        for panel, (label, colour, estimates) in zip(axes, panels, strict=True):
            _draw_candidates(panel, estimates, colour=colour, chosen=[one.is_selected for one in ordered])
            panel.set_title(label, loc="left", color=colour)
        axes[0].set_yticks(range(len(ordered)), [_label(one) for one in ordered])
        axes[0].set_ylim(-0.6, len(ordered) - 0.4)


def _all(value: float | None, low: float | None, high: float | None) -> ValueWithInterval | None:
    return None if value is None else (value, _or_value(low, value), _or_value(high, value))


def _draw_candidates(
    panel: "Axes", estimates: Sequence[ValueWithInterval | None], *, colour: str, chosen: Sequence[bool]
) -> None:
    known = [each for each in estimates if each is not None]
    for place, (estimate, is_chosen) in enumerate(zip(estimates, chosen, strict=True)):
        if estimate is None:
            panel.annotate(
                "not available", (0.02, place), xycoords=("axes fraction", "data"), color=MUTED, va="center", fontsize=9
            )
            continue
        value, low, high = estimate
        style = {"color": colour, "ecolor": f"{colour}88", "fmt": "o", "ms": 6, "capsize": 3, "lw": 2}
        panel.errorbar([value], [place], xerr=_error_bars([value], [low], [high]), clip_on=False, **style)
        if is_chosen:
            _draw_ring(panel, (value, place), colour)
    panel.grid(visible=True, axis="x")
    lows, values = [low for _, low, _ in known], [value for value, _, _ in known]
    if known and _spans_magnitudes(values, lows):
        panel.set_xscale("log")
    elif known:
        panel.set_xlim(left=min(0.0, *lows))


def _label(score: CandidateScore) -> str:
    ahead = f" ({score.distance:+d})" if score.distance else ""
    return f"{_short(score.candidate)}{ahead}"


def _short(name: str) -> str:
    """Shortened in the middle: the end of a path says most. A $ is escaped, which is markup to matplotlib."""
    cut = name if len(name) <= MAX_NAME_CHARS else f"{name[:8]}...{name[-(MAX_NAME_CHARS - 11) :]}"
    return cut.replace("$", r"\$")
