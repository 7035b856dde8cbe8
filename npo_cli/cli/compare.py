"""`npo compare`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import FullOpt, JsonOpt, make_figure_option, make_results_option
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError
from npo_cli.types.comparison import SeedPoint


def compare(
    methods: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD",
            help="[NAME=]RUN[:BRANCH]. The same NAME again is another seed. RUN alone means all its branches; NAME=RUN "
            "needs :BRANCH where there are several. The output folder of npo bench means all its runs.",
            show_default=False,
        ),
    ],
    *,
    thresholds: Annotated[
        str | None,
        typer.Option(
            "--threshold",
            metavar="A,B",
            help="Held-out accuracies whose costs are compared. [default: chosen from the data]",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="Method that the others are compared with. [default: first]"),
    ] = None,
    out: Annotated[Path | None, make_results_option("every evaluation with its costs")] = None,
    figure: Annotated[Path | None, make_figure_option("the learning curves")] = None,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Compare methods by held-out accuracy and by cost.

    95 % intervals over seeds and held-out prompts. Steps, updates, tokens and seconds count everything that a method
    needed: guide caches, scoring, probes and steps that were rolled back.
    """
    levels = parse_thresholds(thresholds) if thresholds is not None else ()

    from npo_cli.api.comparison import compare as compare_runs

    records = compare_runs.stream(methods, thresholds=levels, baseline=baseline, figure=figure)
    from npo_cli.report.conclusions import conclude_compare

    conclude = partial(conclude_compare, methods)
    print_records(records, as_json=as_json, full=full, conclude=conclude, out=out, saved_as=SeedPoint)


def parse_thresholds(text: str) -> tuple[float, ...]:
    """`0.6,0.9` as accuracies."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise NpoError(f"--threshold takes comma-separated accuracies, got {text!r}", "--threshold 0.6,0.9") from error
