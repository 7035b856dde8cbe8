"""`npo index`."""

from typing import Annotated

import typer

from npo_cli.cli.console import draw
from npo_cli.cli.options import JsonOpt, RunArg


def index(
    run: RunArg,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare with the digests.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the checkpoints of a run.

    Step, branch, parent, tier, size, digest, reward and entropy, accuracy, and Q, V and S once scored.
    """
    from npo_cli.stages.index import index_run

    draw(index_run(run, verify=verify), as_json=as_json)
