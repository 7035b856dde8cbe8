"""`npo export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from npo_cli.cli.completion import complete_guide, complete_step
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, RunArg
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path

ExportFormat = Literal["trl", "verl"]


def export(
    run: RunArg,
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="PATH", help="New .parquet file, or new folder.", show_default=False)
    ],
    guide: Annotated[
        str | None,
        typer.Option(
            "--guide", metavar="NAME", help="Export this guide cache, as a table.", autocompletion=complete_guide
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            "--step", min=0, metavar="N", help="Export this checkpoint, as a folder.", autocompletion=complete_step
        ),
    ] = None,
    columns: Annotated[
        ExportFormat,
        typer.Option(
            "--columns", metavar="KIND", help="guide: trl (prompts unchanged) or verl (prompts as chat messages)."
        ),
    ] = "trl",
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Export a guide cache or a checkpoint for other programs.

    A guide cache is written as a parquet table with the columns of TRL and verl, token ids and log-probabilities. A
    checkpoint is written as a folder that from_pretrained (or peft) loads, with a model card.
    """
    if (guide is None) == (step is None):
        raise NpoError(
            "npo export needs either --guide NAME or --step N", f"npo export {quote_path(run)} --step N --out DIR"
        )

    from npo_cli.interop.export import export_checkpoint, export_guide

    if guide is not None:
        records = export_guide(run, guide, out=out, form=columns)
    else:
        records = export_checkpoint(run, step=step or 0, branch=branch, out=out)
    print_records(records, as_json=as_json)
