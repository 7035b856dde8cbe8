"""Verified answers as a parquet table for other trainers: the columns that TRL and verl read, and npo's own beside.

TRL reads `prompt` and `completion` (text, or chat messages where the prompt is a chat); verl reads `prompt` (always
messages), `data_source`, `ability`, `reward_model` and `extra_info`. Both read `images` (bytes, in Hugging
Face's form), which is there where prompts have any. Neither minds columns of others. `prompt_id`, `response`,
`response_ids` and `logps` are what `npo sample-guide --source file` reads back.

Reads JSONL and parquet into rows that know where they stand, so that an error can say which line to mend.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from npo_cli.errors import NpoError, quote_path
from npo_cli.images import load_image_bytes
from npo_cli.types.guides import GuideRollout
from npo_cli.types.rollouts import Prompt

BATCH_ROWS = 32
"""Of a column with pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One record of a file."""

    position: int
    """From 0, blank lines not counted."""
    location: str
    """`data.jsonl line 3` or `data.parquet row 3`, counted from 1."""
    values: dict[str, Any]


def read_rows(path: Path, *, columns: Sequence[str]) -> list[TableRow]:
    """All rows of a file. `columns` are those worth reading, where the format lets one choose."""
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise NpoError(f"the data file {path} {what}", "mend task.path (relative paths start at the current folder)")
    if path.suffix not in readers:
        raise NpoError(f"the data file {path} is neither .jsonl nor .parquet", "convert it, one JSON object a line")
    try:
        rows = list(readers[path.suffix](path, columns))
    except OSError as error:
        raise NpoError(f"the data file {path} cannot be read: {error.strerror or error}", "mend its rights") from error
    if not rows:
        raise NpoError(f"the data file {path} is empty", "it needs one row per prompt")
    return rows


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    position = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            yield TableRow(position=position, location=place, values=_json_object(line, place))
            position += 1


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        # Decimals keep the answer 0.10 as it was written.
        value = json.loads(
            line.decode("utf-8-sig"), parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_once
        )
    except (ValueError, RecursionError) as error:
        raise NpoError(f"{place} is not valid JSON: {error}", "write one JSON object a line, in UTF-8") from error
    if not isinstance(value, dict):
        raise NpoError(f"{place} is a JSON {_json_kind(value)}, not an object", 'write {"prompt": ..., "answer": ...}')
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key come twice and readers keep the last: which one was meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _json_kind(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def read_parquet_column(path: Path, column: str) -> Iterator[Any]:
    """One column of a file whose other columns were read, a few rows in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                yield from [None] * file.metadata.num_rows
                return
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise NpoError(f"{path} is not a readable parquet file: {error}", "write it again") from error


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NpoError(
            f"reading {path} needs the package pyarrow, which is not installed", "pip install pyarrow, or use .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            wanted = [name for name in columns if name in there]
            num_rows = file.metadata.num_rows
            values = file.read(columns=wanted).to_pylist() if wanted else [{}] * num_rows
    except pyarrow.ArrowException as error:
        raise NpoError(f"{path} is not a readable parquet file: {error}", "write it again") from error
    # An absent column is kept absent, and the names that are there are told with it.
    for position, row in enumerate(values):
        rest = {name: None for name in there if name not in columns}
        yield TableRow(position=position, location=f"{path} row {position + 1}", values=rest | row)


TableFormat = Literal["trl", "verl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedResponse:
    """A prompt and one answer to it."""

    prompt: Prompt
    trajectory: GuideRollout
    data_source: str
    """Name of the data, by which verl chooses its reward function."""


def validate_table_path(path: Path) -> None:
    """A file that exists is never replaced, and its ending says what it is."""
    if path.suffix != ".parquet":
        raise NpoError(f"--out {path}: a table ends in .parquet", f"--out {quote_path(path)}.parquet")
    if path.exists():
        raise NpoError(f"--out {path} exists", "name another file, or remove that one")
    if not path.absolute().parent.is_dir():
        raise NpoError(f"--out {path}: there is no folder {path.parent}", f"mkdir -p {quote_path(path.parent)}")


def write_table(path: Path, answers: Sequence[ExportedResponse], *, table_format: TableFormat) -> bool:
    """Write the table whole. True where prompts that are plain text had to become chats."""
    validate_table_path(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NpoError(
            f"writing {path} needs the package pyarrow, which is not installed", "pip install pyarrow"
        ) from error
    chats = table_format == "verl" or any(each.prompt.messages for each in answers)
    shown = any(each.prompt.images for each in answers)
    rows = [_row(each, number, chats=chats) for number, each in enumerate(answers)]
    turns = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    words = turns if chats else pyarrow.string()
    text, number = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        [
            *(("prompt", words), ("completion", words), ("reward", pyarrow.float32())),
            *(("data_source", text), ("ability", text)),
            ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pyarrow.struct([("split", text), ("index", number), ("prompt_id", text)])),
            *(("prompt_id", text), ("answer", text), ("response", text)),
            *(("response_ids", pyarrow.list_(number)), ("logps", pyarrow.list_(pyarrow.float32()))),
            *(("verdict", text), ("source", text), ("guide_step", number), ("finished", pyarrow.bool_())),
            *(("num_sampled", number), ("num_correct", number)),
            *(
                [("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])))]
                if shown
                else []
            ),
        ]
    )
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    return chats and any(each.prompt.text is not None for each in answers)


def _row(each: ExportedResponse, number: int, *, chats: bool) -> dict[str, Any]:
    prompt, kept = each.prompt, each.trajectory
    said = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    asked = said or [{"role": "user", "content": prompt.text}]
    return {
        "prompt": asked if chats else prompt.text,
        "completion": [{"role": "assistant", "content": kept.text}] if chats else kept.text,
        "reward": float(kept.verdict == "correct"),
        "data_source": prompt.dataset or each.data_source,
        "ability": each.data_source,
        "reward_model": {"style": "rule", "ground_truth": prompt.answer},
        "extra_info": {"split": "train", "index": number, "prompt_id": prompt.prompt_id},
        "prompt_id": prompt.prompt_id,
        "answer": prompt.answer,
        "response": kept.text,
        "response_ids": list(kept.response_ids),
        "logps": None if kept.behavior_logps is None else list(kept.behavior_logps),
        "verdict": kept.verdict,
        "source": kept.source,
        "guide_step": kept.guide_step,
        "finished": kept.finished,
        "num_sampled": kept.num_sampled,
        "num_correct": kept.num_correct,
        "images": [{"bytes": load_image_bytes(image), "path": Path(image.location).name} for image in prompt.images],
    }
