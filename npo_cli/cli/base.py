"""`npo base`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.console import print_records


def base(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the model.", show_default=False)],
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Supervised steps.")] = 1200,
    seed: Annotated[int, typer.Option("--seed", help="Seed of samples and weights.")] = 0,
) -> None:
    """Make the embedded micro base again.

    A small model is taught additions from noisy scratchpads.
    """
    from npo_cli.run_dir.paths import check_unused

    check_unused(out, flag="--out")

    from npo_cli.stages.base import make_base

    print_records(make_base(out, steps=steps, seed=seed), as_json=False)
