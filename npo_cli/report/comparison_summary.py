"""Several runs in words, tables and pictures: the comparison that `npo compare` makes of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from npo_cli.report.curve_plots import make_method_plots
from npo_cli.report.html import Subsection, SummaryLine
from npo_cli.report.table import format_count
from npo_cli.report.tables_compare import COMPARE_TABLES
from npo_cli.types.comparison import (
    CurveBandPoint,
    Estimate,
    MethodDifference,
    MethodHysteresis,
    MethodSummary,
    MethodTimeToThreshold,
    SpeedUp,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Methods over their seeds; the first is the baseline."""

    records: tuple[Any, ...]
    """Those of `npo compare`."""
    bands: tuple[CurveBandPoint, ...]
    """Mean curves with their intervals."""

    def of(self, kind: type) -> list[Any]:
        """The records of one kind."""
        return [record for record in self.records if type(record) is kind]


def summarize_comparison(found: Comparison) -> Iterator[SummaryLine]:
    """Each method's accuracy and cost, and whether it was worth it by total tokens."""
    summaries: list[MethodSummary] = found.of(MethodSummary)
    differences = {one.method: one for one in found.of(MethodDifference)}
    for method in summaries:
        yield SummaryLine(label=method.method, text=_describe_method(method, differences.get(method.method)))
    yield SummaryLine(label="Worth it?", text=" ".join(_judge_methods(found, summaries)))


def _describe_method(method: MethodSummary, difference: MethodDifference | None) -> str:
    tokens = method.mean_costs.get("tokens")
    cost = f" for {format_count(round(tokens))} tokens" if tokens is not None else ""
    seeds = f"{len(method.seeds)} seed{'s' * (len(method.seeds) != 1)}"
    text = f"final accuracy {_format(method.final_accuracy)}{cost}, mean of {seeds} at step {method.horizon}"
    if difference is None:
        return f"{text}; the baseline."
    return f"{text}; {_format(difference.final_accuracy, sign='+')} against {difference.baseline}."


def _format(one: Estimate, *, sign: str = "", digits: int = 3) -> str:
    known = one.low is not None and one.high is not None
    interval = f" [{one.low:{sign}.{digits}f}, {one.high:{sign}.{digits}f}]" if known else ""
    return f"{one.value:{sign}.{digits}f}{interval}"


def _judge_methods(found: Comparison, summaries: Sequence[MethodSummary]) -> Iterator[str]:
    """By total tokens, to the highest threshold at which the baseline's cost is known."""
    ratios: list[SpeedUp] = [one for one in found.of(SpeedUp) if "tokens" in one.restricted_mean_ratio]
    if not ratios:
        alone = len(summaries) == 1
        yield "One method: nothing to compare." if alone else "Unknown: no method rose above its start."
        return
    level = max(one.threshold for one in ratios)
    yield f"By total tokens, to an accuracy of {level:g} (cost of {ratios[0].baseline} / cost of the method):"
    for method in summaries[1:]:
        own, held = (
            next(
                (one for one in ratios if (one.method, one.threshold, one.curve) == (method.method, level, kind)), None
            )
            for kind in ("own", "best held")
        )
        if own is not None:
            yield _judge(own, held)


def _judge(own: SpeedUp, held: SpeedUp | None) -> str:
    ratio = own.restricted_mean_ratio["tokens"]
    low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
    verdict = "yes" if low > 1 else "no" if high <= 1 else "not shown"
    text = f"{own.method} {verdict}, {_format(ratio, digits=2)}x"
    by_step = own.restricted_mean_ratio.get("step")
    text += f" ({by_step.value:.2f}x by step)" if by_step is not None else ""
    if held is not None:
        text += f", best held {_format(held.restricted_mean_ratio['tokens'], digits=2)}x"
    return f"{text}."


def build_comparison(found: Comparison) -> Subsection:
    """The mean curves, and every table of `npo compare`."""
    kinds = (MethodSummary, MethodDifference, MethodTimeToThreshold, SpeedUp, MethodHysteresis)
    groups = [(kind, found.of(kind)) for kind in kinds]
    return Subsection(
        title="Methods compared",
        text="Mean curves over the seeds with 95 % intervals. Costs count everything that a method needed.",
        plots=tuple(make_method_plots(found.bands, prefix="methods-")),
        tables=tuple(table for kind, group in groups if group for table in COMPARE_TABLES[kind](group)),
    )
