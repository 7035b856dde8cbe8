"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer


def _permit_code(is_allowed: bool) -> bool:
    if is_allowed:
        from npo_cli.tasks.custom_verifier import permit_code

        permit_code()
    return is_allowed


RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
OverridesArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's, such as train.lr=3e-4."),
]
BranchOpt = Annotated[str | None, typer.Option("--branch", metavar="NAME", help="Branch of the run. [default: newest]")]
AllowCodeOpt = Annotated[
    bool,
    typer.Option("--allow-code", callback=_permit_code, help="Allow task.verifier to run a function of your own."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON lines on stdout and nothing else.")]
UntilOpt = Annotated[
    int | None,
    typer.Option("--until", min=0, metavar="STEP", help="Stop after this step, saved; npo resume goes on."),
]
RecipeArg = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one (npo recipes).")
]
