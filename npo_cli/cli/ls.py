"""`npo ls`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import FullOpt, JsonOpt
from npo_cli.cli.output import print_records


def list_run_directories(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder whose runs are listed, at any depth.")
    ] = Path("runs"),
    *,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """List the runs below a folder.

    Recipe, branches, steps, best held-out accuracy, size, and state: running (a process holds the run), stopped (a
    branch was interrupted), finished, or damaged.
    """
    from npo_cli.report.verdicts import conclude_listing
    from npo_cli.storage.run_list import list_runs

    print_records(list(list_runs(folder)), as_json=as_json, full=full, conclude=partial(conclude_listing, folder))
