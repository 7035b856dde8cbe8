"""The recorded metrics that AutoNPO reads: along a branch's ancestry, oldest step first."""

from collections.abc import Iterator, Mapping
from typing import Any

from npo_cli.autonpo.trigger import TriggerInput
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry
from npo_cli.storage.metrics import read_metrics

MetricsRow = Mapping[str, Any]
"""Metrics of a step by name."""


def read_line_metrics(run: RunDir, branch: str, last: int) -> Iterator[MetricsRow]:
    """The metrics of every step of the line of descent up to `last`."""
    for span in ancestry(run, branch):
        for row in read_metrics(run, span.branch):
            if span.contains(row["step"]) and row["step"] <= last:
                yield row


def read_trigger_inputs(run: RunDir, branch: str, last: int) -> Iterator[TriggerInput]:
    """Reward and entropy of the same steps."""
    return map(parse_trigger_input, read_line_metrics(run, branch, last))


def parse_trigger_input(row: MetricsRow) -> TriggerInput:
    """Reward and entropy of a step's metrics; an absent number is missing."""
    return TriggerInput(step=row["step"], reward=row.get("reward"), entropy=row.get("entropy"))
