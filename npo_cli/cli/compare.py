"""`npo compare`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import JsonOpt
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError

FIGURE_FORMATS = (".png", ".svg")


def compare(
    arms: Annotated[
        list[str],
        typer.Argument(
            metavar="ARM",
            help="[NAME=]RUN[:BRANCH]. The same NAME again is another seed; a RUN alone stands for all its branches, "
            "the folder of an npo bench for all its runs.",
            show_default=False,
        ),
    ],
    thresholds: Annotated[
        list[float] | None,
        typer.Option(
            "--threshold", metavar="A", help="Held-out accuracy to reach; may be repeated. [default: 0.6, 0.9]"
        ),
    ] = None,
    *,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="Arm that the others are compared with. [default: the first]"),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every evaluation with its costs.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="Draw the curves: a .png or .svg file.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Compare methods: what each reached, and at what cost.

    Over seeds and held-out prompts, with 95 % intervals. Steps, updates, tokens and seconds count everything an arm
    needed: guides, scoring, probes, what was rolled back.
    """
    for threshold in thresholds or ():
        if not 0 < threshold <= 1:
            raise NpoError(f"--threshold must be above 0 and at most 1, got {threshold}", "--threshold 0.9")
    if figure is not None and figure.suffix.lower() not in FIGURE_FORMATS:
        raise NpoError(f"--figure draws .png and .svg, not {figure.name!r}", "--figure comparison.png")
    for option, path in (("--csv", csv), ("--figure", figure)):
        if path is not None and path.is_dir():
            raise NpoError(f"{option}: {path} is a folder", "name a file in it")

    from npo_cli.experiments.compare import compare_runs

    print_records(
        compare_runs(arms, thresholds=thresholds or (), baseline=baseline, csv=csv, figure=figure), as_json=as_json
    )
