"""`npo verify`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import JsonOpt, RunArg
from npo_cli.cli.output import to_json_line
from npo_cli.cli.terminal import escape_for_terminal, print_data
from npo_cli.errors import quote_path
from npo_cli.types.views import Damage, VerifiedRun

AcceptOpt = Annotated[
    list[Path] | None,
    typer.Option("--accept", metavar="FILE", help="First take this log as it is, or without its lost head."),
]


def verify(run: RunArg, *, accept: AcceptOpt = None, as_json: JsonOpt = False) -> None:
    """Check every file of a run, and say what can be restored.

    The exit code is 1 if anything is damaged.
    """
    from npo_cli.storage.verify import accept_logs, verify_run

    if accept:
        accept_logs(run, accept)
    for record in verify_run(run):
        if as_json:
            print_data(to_json_line(record))
        elif isinstance(record, Damage):
            print_data(escape_for_terminal(f"{record.message}: {record.restore}"))
        else:
            verdict = f"{record.num_damages} damaged" if record.num_damages else "whole"
            read = f"{record.num_checkpoints} checkpoints, {record.num_logs} logs"
            print_data(escape_for_terminal(f"{run}: {verdict} ({read})"))
    # The record of the whole run comes last.
    if isinstance(record, VerifiedRun) and record.num_damages:
        raise typer.Exit(1)
    if not as_json:
        print_data(f"next: npo show {escape_for_terminal(quote_path(run))}")
