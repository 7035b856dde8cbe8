"""`npo report`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.output import print_records


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or folders of npo bench.", show_default=False),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page, ending in .html.")] = Path(
        "npo-report.html"
    ),
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="DIR", help="Also every picture as PNG and SVG.")
    ] = None,
) -> None:
    """Runs as one HTML page that needs no network.

    Curves, lineage, Q, V and S, decisions with their evidence, costs, and answers beside the guide's.
    """
    from npo_cli.report.build import write_report

    print_records(write_report(runs, out, plots_folder=pictures), as_json=False)
