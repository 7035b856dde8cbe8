"""`npo doctor`."""

from typing import Annotated

import typer

from npo_cli.cli.options import JsonOpt
from npo_cli.cli.output import print_records
from npo_cli.types.views import Conclusion

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
    missing = [check.name for check in checks if check.is_required and not check.is_ok]
    if missing:
        print_records([*checks, Conclusion(sentence=f"Missing: {', '.join(missing)}.")], as_json=as_json)
        raise typer.Exit(1)
    tried = "everything that is required works" if full else "every required package is here"
    conclusion = Conclusion(sentence=f"npo can run: {tried}.", next="npo demo" if full else "npo doctor --full")
    print_records([*checks, conclusion], as_json=as_json)
