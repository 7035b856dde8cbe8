"""`npo doctor`."""

import typer

from npo_cli.cli.options import JsonOpt
from npo_cli.cli.output import print_records


def doctor(as_json: JsonOpt = False) -> None:
    """Check what this machine can run.

    The exit code is 1 if a requirement is missing.
    """
    from npo_cli.cli.environment_checks import run_checks

    checks = run_checks()
    print_records(checks, as_json=as_json)
    if any(check.is_required and not check.is_ok for check in checks):
        raise typer.Exit(1)
