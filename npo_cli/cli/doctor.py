"""`npo doctor`."""

from typing import Annotated

import typer

from npo_cli.cli.options import JsonOpt
from npo_cli.cli.output import print_records

FullOpt = Annotated[
    bool, typer.Option("--full", help="Also import torch and try each engine, which takes up to some minutes.")
]


def doctor(*, full: FullOpt = False, as_json: JsonOpt = False) -> None:
    """Check what this machine can run.

    Versions are read from the installed packages, without importing them, in about a second. The exit code is 1 if a
    requirement is missing.
    """
    from npo_cli.preflight.environment import run_checks

    checks = run_checks(full=full)
    print_records(checks, as_json=as_json)
    if any(check.is_required and not check.is_ok for check in checks):
        raise typer.Exit(1)
