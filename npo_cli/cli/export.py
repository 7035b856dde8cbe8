"""`npo export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from npo_cli.cli.options import AllowCodeOpt, BranchOpt, RunArg
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path

ExportFormat = Literal["trl", "verl"]


def export(
    run: RunArg,
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="PATH", help="New .parquet file, or new folder.", show_default=False)
    ],
    guide: Annotated[str | None, typer.Option("--guide", metavar="NAME", help="This guide cache, as a table.")] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, metavar="N", help="This checkpoint, as a folder.")
    ] = None,
    columns: Annotated[
        ExportFormat,
        typer.Option("--columns", metavar="KIND", help="guide: trl (prompts as they are) or verl (as chats)."),
    ] = "trl",
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
) -> None:
    """Hand a guide cache or a checkpoint to other programs.

    A guide cache becomes a parquet table with the columns of TRL and of verl, token ids and log-probabilities beside
    them. A checkpoint becomes a folder that from_pretrained (or peft) opens, with a model card.
    """
    if (guide is None) == (step is None):
        raise NpoError(
            "npo export takes either --guide NAME or --step N", f"npo export {quote_path(run)} --step N --out DIR"
        )

    from npo_cli.interop.export import export_checkpoint, export_guide

    if guide is not None:
        records = export_guide(run, guide, out=out, form=columns)
    else:
        records = export_checkpoint(run, step=step or 0, branch=branch, out=out)
    print_records(records, as_json=False)
