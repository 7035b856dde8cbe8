"""`npo rm`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import FullOpt, JsonOpt
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path


def remove(
    place: Annotated[str, typer.Argument(metavar="RUN:BRANCH", help="Branch to delete.", show_default=False)],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it nothing is changed.")] = False,
    recursive: Annotated[
        bool,
        typer.Option(
            "--recursive",
            help="Also what depends on it: branches forked from it or merged with it, guide caches and scorings for "
            "it.",
        ),
    ] = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Delete a branch. Without --yes: what would be deleted, and its size.

    What the branch cost stays in costs.jsonl, its evaluations and its lines in the lineage stay too, and its name is
    not used again. main cannot be deleted, nor the branch that AutoNPO is on.
    """
    root, branch = parse_place(place)
    from npo_cli.report.conclusions import conclude_removal
    from npo_cli.storage.removal import remove_branch

    records = list(remove_branch(root, branch, recursive=recursive, is_confirmed=yes))
    conclude = partial(conclude_removal, root, branch, recursive)
    print_records(records, as_json=as_json, full=full, conclude=conclude)


def parse_place(text: str) -> tuple[Path, str]:
    """`runs/a:late` as run directory and branch."""
    root, colon, branch = text.rpartition(":")
    if not colon or not root or not branch:
        raise NpoError(f"npo rm takes RUN:BRANCH, got {text!r}", f"npo rm {quote_path(Path(text or 'RUN'))}:BRANCH")
    return Path(root), branch
