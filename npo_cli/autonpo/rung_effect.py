"""What a rung was worth, measured on the record, and what it is expected to be worth the next time.

No run has a twin without the rung, so the comparison is with its own past: the trend of the on-policy accuracy before
the trigger, extrapolated to what the window cost. `docs/explanation/autonpo-ladder.md` says how far that carries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from npo_cli.autonpo.signals import MetricsRow, read_line_metrics
from npo_cli.storage.costs import read_cost_lines, relative_artifact
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, is_scout
from npo_cli.types.autonpo import RungEffect, RungForecast, Transition

UNTRIED_VALUE = 1.0
"""Break-even: a rung that was never measured in this run is taken once."""
MIN_STEPS = 3
"""A trend takes two degrees of freedom; fewer steps leave no estimate of the noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """The mean of new observations, and its difference from an extrapolated trend with a 95 % interval."""

    mean: float
    difference: float
    low: float
    high: float


def compare_with_trend(before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> Deviation:
    """Points (x, y): the mean of `after` minus the least-squares line of the n points `before`, at the same mean x.

    Variance s^2 (1/n + 1/m + (x_after - x_before)^2 / S_xx), s^2 of the residuals before; Student's t with n - 2
    degrees of freedom. Noise is taken as independent from step to step.
    """
    from scipy.stats import t as student

    num, (x_before, y_before), (x_after, y_after) = len(before), _centre(before), _centre(after)
    sum_xx = math.fsum((x - x_before) ** 2 for x, _ in before)
    slope = math.fsum((x - x_before) * (y - y_before) for x, y in before) / sum_xx
    residual = math.fsum((y - y_before - slope * (x - x_before)) ** 2 for x, y in before)
    scale = 1 / num + 1 / len(after) + (x_after - x_before) ** 2 / sum_xx
    half = float(student.ppf(0.975, num - 2)) * math.sqrt(residual / (num - 2) * scale)
    difference = y_after - y_before - slope * (x_after - x_before)
    return Deviation(mean=y_after, difference=difference, low=difference - half, high=difference + half)


def _centre(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(x for x, _ in points), fmean(y for _, y in points)


def measure_rung(
    run: RunDir, transitions: Sequence[Transition], *, rung: str, last: int, rollouts_per_step: int
) -> RungEffect | None:
    """The effect of the intervention made last, whose cooldown ends at step `last`; None if too little is on record.

    x is what was executed since the trigger, in steps of the time before it: the window and its guides, scout and
    probe by their tokens, then one per step. So a rollback is measured at equal cost too. The trend is
    fitted to as many steps before the trigger as were executed since.
    """
    applied = [one for one in transitions if one.event in ("rung_applied", "rolled_back")][-1]
    start, end, parent = applied.evidence["to_step"], applied.evidence["until_step"], applied.evidence["parent"]
    line = [row for row in read_line_metrics(run, parent, applied.step) if row.get("accuracy") is not None]
    rows = [row for row in read_line_metrics(run, applied.state.branch, last) if row.get("accuracy") is not None]
    window = [row for row in rows if start < row["step"] <= end]
    after = [row for row in rows if row["step"] > end]
    before = line[-len(window) - len(after) :]
    if len(before) < MIN_STEPS or not window or not after:
        return None
    tokens = sum(row["tokens"] for row in window) + count_other_tokens(run, applied)
    cost = tokens / fmean(row["tokens"] for row in before)
    past = [row["step"] - applied.step for row in before]
    accuracy = compare_with_trend(
        list(zip(past, (row["accuracy"] for row in before), strict=True)),
        [(cost + place, row["accuracy"]) for place, row in enumerate(after, start=1)],
    )
    partly_solved = compare_with_trend(
        list(zip(past, map(partly_solved_share, before), strict=True)),
        [(cost * place / len(window), partly_solved_share(row)) for place, row in enumerate(window, start=1)],
    )
    rate = estimate_rate([row["accuracy"] for row in line], len(before), rollouts_per_step=rollouts_per_step)
    value, low, high = (1 + part / rate / cost for part in (accuracy.difference, accuracy.low, accuracy.high))
    return RungEffect(
        rung=rung,
        num_before=len(before),
        num_after=len(after),
        accuracy=accuracy.mean,
        accuracy_expected=accuracy.mean - accuracy.difference,
        effect=accuracy.difference,
        effect_low=accuracy.low,
        effect_high=accuracy.high,
        partly_solved_gain=partly_solved.difference,
        partly_solved_gain_low=partly_solved.low,
        partly_solved_gain_high=partly_solved.high,
        cost=cost,
        rate=rate,
        steps_saved=accuracy.difference / rate,
        value=value,
        value_low=low,
        value_high=high,
    )


def partly_solved_share(row: MetricsRow) -> float:
    """Share of groups whose own rollouts were neither all right nor all wrong."""
    return 1.0 - row["frac_all_wrong"] - row["frac_all_right"]


def estimate_rate(accuracies: Sequence[float], num: int, *, rollouts_per_step: int) -> float:
    """Accuracy gained per step: the mean of the last `num` steps minus that of the first, over the steps between.

    At least one correct rollout more in the whole record.
    """
    num = max(1, min(num, len(accuracies) // 2))
    steps = max(1, len(accuracies) - num)
    return max((fmean(accuracies[-num:]) - fmean(accuracies[:num])) / steps, 1 / (rollouts_per_step * len(accuracies)))


def count_other_tokens(run: RunDir, applied: Transition) -> int:
    """Tokens of the probe at the trigger, and of the guide cache and the scout of the branch; a piece made again counts
    once."""
    first = find_first_segment(run, applied.state.branch)
    folder = None if first.guide_cache is None else relative_artifact(run, run.guide_folder(first.guide_cache))
    teacher = None if first.teacher is None else first.teacher[0]
    scout = teacher if teacher is not None and is_scout(run, teacher) else None
    place = (applied.evidence["parent"], applied.step)
    found = {
        line.key: line.tokens
        for line in read_cost_lines(run)
        if (line.kind == "probe" and (line.branch, line.step) == place)
        or (line.kind == "guide_cache" and line.artifact == folder)
        or (line.kind == "train" and line.branch == scout)
    }
    return sum(found.values())


def forecast_rung(rung: str, transitions: Sequence[Transition]) -> RungForecast:
    """The mean of the rung's values in this run, weighted by precision; break-even for one that was never measured."""
    effects = [one.evidence for one in transitions if one.event == "rung_measured" and one.evidence["rung"] == rung]
    if not effects:
        return RungForecast(rung=rung, basis="untried", value=UNTRIED_VALUE)
    halves = [(one["value_high"] - one["value_low"]) / 2 for one in effects]
    if min(halves) > 0:
        weights = [half**-2 for half in halves]
        value = _weighted_mean(effects, weights)
        half = sum(weights) ** -0.5
    else:
        value, half = _weighted_mean(effects, [1.0] * len(effects)), 0.0
    times = "once" if len(effects) == 1 else f"{len(effects)} times"
    reason = f"measured {times} in this run, it was worth {value:.2f} steps per step that it cost"
    return RungForecast(
        rung=rung,
        basis="measured",
        value=value,
        value_low=value - half,
        value_high=value + half,
        num_measured=len(effects),
        reason="" if value >= 1 else reason,
    )


def _weighted_mean(effects: Sequence[Any], weights: Sequence[float]) -> float:
    total = math.fsum(weight * one["value"] for one, weight in zip(effects, weights, strict=True))
    return total / math.fsum(weights)
