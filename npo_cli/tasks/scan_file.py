"""Every fault of a data file at once, for `npo check`; training stops at the first one (`file_dataset`)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.base import LoadedPrompts
from npo_cli.tasks.data_sets import DataPart, read_part
from npo_cli.tasks.file_dataset import (
    MORE_ROWS,
    LocatedPrompt,
    check_disjoint,
    check_num_rows,
    check_unique_ids,
    iter_prompts,
    split_prompts,
    without_id,
)
from npo_cli.tasks.table_io import read_json_rows

MAX_LISTED = 5
"""Rows that a message lists."""
OWN_WORDS = re.compile(r"(?<=JSON): .*|(?<=, image) \d+( \([^)]*\))?|\d+ x \d+ = [\d,]+(?= pixels)")
"""What differs between two messages about the same fault: the place in a line, an image's name and size."""


@dataclass(kw_only=True, slots=True)
class FileScan:
    """What a data file holds, and what is wrong with it."""

    num_rows: int = 0
    """Those with faults included."""
    columns: tuple[str, ...] = ()
    located: list[LocatedPrompt] = field(default_factory=list)
    """The rows without faults."""
    faults: list[NpoError] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    """Locations of rows with the prompt of an earlier row."""


def scan_file(part: DataPart, settings: TaskSettings, prefix: str) -> FileScan:
    """Read a file or data set row by row; rows with the same fault are one fault."""
    scan, file = FileScan(), part.file
    faults: list[tuple[str, NpoError]] = []
    try:
        is_json = file.is_file() and file.suffix == ".jsonl"
        rows = read_json_rows(file, faults.append) if is_json else read_part(part, without=settings.image_column)
        scan.num_rows = len(rows) + len(faults)
        scan.columns = tuple(dict.fromkeys(name for row in rows for name in row.values))
        scan.located = list(iter_prompts(part, settings, prefix, rows, faults.append))
        if not rows and not faults:
            faults.append(("", NpoError(f"the data file {file} is empty", "it needs one row per prompt")))
    except NpoError as error:
        faults.append(("", error))
    scan.faults = _merge_faults(faults)
    first: set[object] = set()
    for prompt, location in scan.located:
        if without_id(prompt) in first:
            scan.repeated.append(location)
        first.add(without_id(prompt))
    return scan


def scan_split(
    scan: FileScan, heldout: FileScan | None, settings: TaskSettings, seed: int
) -> tuple[LoadedPrompts, list[NpoError]]:
    """The training and held-out prompts, and the faults of the split."""
    faults: list[NpoError] = []
    train, held = scan.located[: settings.pool_size], list(heldout.located if heldout else ())[: settings.heldout_size]
    if heldout is None and len(scan.located) > settings.heldout_size:
        train, held = split_prompts(scan.located, settings, seed)
    checks: list[Callable[[], None]] = [
        lambda: check_unique_ids([*train, *held]),
        lambda: check_disjoint(train, held),
    ]
    if heldout is None:
        checks.append(
            lambda: check_num_rows(scan.num_rows, settings.heldout_size, source=f"{settings.path} has", hint=MORE_ROWS)
        )
    for check in checks:
        try:
            check()
        except NpoError as error:
            faults.append(error)
    by_id = {prompt.prompt_id: prompt for prompt, _ in [*held, *train]}
    kept = tuple(by_id[each] for each in dict.fromkeys(prompt.prompt_id for prompt, _ in train))
    rest = tuple(prompt for prompt in by_id.values() if prompt not in kept)
    return LoadedPrompts(train=kept, heldout=rest), faults


def _merge_faults(faults: Sequence[tuple[str, NpoError]]) -> list[NpoError]:
    """One error per kind of fault, with the rows that have it."""
    kinds: dict[str, list[tuple[str, NpoError]]] = {}
    for location, error in faults:
        text = error.message.replace(location, "") if location else error.message
        kinds.setdefault(OWN_WORDS.sub("", text), []).append((location, error))
    merged = []
    for some in kinds.values():
        first, others = some[0][1], [location.rpartition(" ")[2] for location, _ in some[1:]]
        more = f"; and in {len(others)} more rows: {', '.join(others[:MAX_LISTED])}" if others else ""
        more += ", ..." if len(others) > MAX_LISTED else ""
        merged.append(NpoError(f"{first.message}{more}", first.hint))
    return merged
