"""`npo ls`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import FullOpt, JsonOpt, make_results_option
from npo_cli.cli.output import print_records
from npo_cli.types.views import RunListing


def list_run_directories(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder whose runs are listed, at any depth.")
    ] = Path("runs"),
    *,
    out: Annotated[Path | None, make_results_option("the list of runs")] = None,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """List the runs below a folder.

    Recipe, branches, steps, best held-out accuracy, size, and state: running (a process holds the run), stopped (a
    branch was interrupted), finished, or damaged.
    """
    from npo_cli.report.conclusions import conclude_listing
    from npo_cli.storage.run_list import list_runs

    records, conclude = list(list_runs(folder)), partial(conclude_listing, folder)
    print_records(records, as_json=as_json, full=full, conclude=conclude, out=out, saved_as=RunListing)
