"""`npo report`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.completion import complete_branch
from npo_cli.cli.options import JsonOpt, make_figure_option
from npo_cli.cli.output import print_records


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or output folders of npo bench.", show_default=False),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write (.html or .pdf).")] = Path(
        "npo-report.html"
    ),
    branch: Annotated[
        str | None,
        typer.Option(
            "--branch",
            metavar="NAME",
            help="Branch whose costs and responses lead. [default: the best]",
            autocompletion=complete_branch,
        ),
    ] = None,
    figure: Annotated[Path | None, make_figure_option("the curves of held-out accuracy")] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Also save every figure as PNG and SVG.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a report of one or several runs.

    One self-contained HTML page, or a PDF (printed by an installed Chromium): a summary in words, the commands that
    make the run again, curves, lineage, Q, V and S, AutoNPO's decisions, costs, and responses of policy and guide.
    """
    from npo_cli.report.build import validate_output, write_report
    from npo_cli.storage.bench_dir import is_bench

    validate_output(out)
    comparison = None
    if len(runs) == 1 and is_bench(runs[0]):
        from npo_cli.experiments.compare import read_comparison

        comparison = read_comparison(runs[0])
    records = write_report(runs, out, figure=figure, plots_folder=figures, branch=branch, comparison=comparison)
    from npo_cli.report.conclusions import conclude_report

    print_records(records, as_json=as_json, conclude=partial(conclude_report, runs, out, branch))
