"""Tables: rows of .jsonl, .json, .csv and .parquet files with their location, and the export of verified responses.

The exported parquet table has the columns that TRL and verl read. TRL: `prompt` and `completion` (text, or messages for
a chat). verl: `prompt` (always messages), `data_source`, `ability`, `reward_model`, `extra_info`. Both: `images` (bytes
in Hugging Face's form), if prompts have any. `prompt_id`, `response`, `response_ids` and `logps` are what
`npo sample-guide --source file:PATH` reads back.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from npo_cli.errors import NpoError, quote_path
from npo_cli.images import load_image_bytes
from npo_cli.types.rollouts import Prompt, PromptSamples, Rollout

BATCH_ROWS = 32
"""Rows in memory at a time, for a column with images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One record of a file."""

    position: int
    """Index from 0, without blank lines."""
    location: str
    """`data.jsonl line 3` or `data.parquet row 3`, counted from 1."""
    values: dict[str, Any]


def read_rows(path: Path, *, columns: Sequence[str] | None = None, without: str | None = None) -> list[TableRow]:
    """All rows of a file; from parquet only the given columns (None: all), the others being None, as is `without`."""
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".json": _json_rows, ".csv": _csv_rows}
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise NpoError(f"the data file {path} {problem}", "fix task.path (relative paths start at the current folder)")
    if path.suffix not in readers:
        raise NpoError(
            f"the data file {path} is none of {', '.join(readers)}", "convert it to .jsonl: one JSON object per line"
        )
    try:
        rows = list(readers[path.suffix](path, columns, without))
    except OSError as error:
        raise NpoError(
            f"the data file {path} cannot be read: {error.strerror or error}", "check its permissions"
        ) from error
    if not rows:
        raise NpoError(f"the data file {path} is empty", "it needs one row per prompt")
    return rows


def _jsonl_rows(path: Path, columns: Sequence[str] | None, without: str | None) -> Iterator[TableRow]:
    position = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            location = f"{path} line {number}"
            yield TableRow(position=position, location=location, values=_json_object(line, location))
            position += 1


def _json_rows(path: Path, columns: Sequence[str] | None, without: str | None) -> Iterator[TableRow]:
    """The rows of one JSON array."""
    try:
        values = _parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        hint = "name it .jsonl if each line is an object" if "Extra data" in str(error) else "write an array of objects"
        raise NpoError(f"{path} is not valid JSON: {error}", hint) from error
    if not isinstance(values, list):
        kind = "object" if isinstance(values, dict) else _json_kind(values)
        raise NpoError(f"{path} is a JSON {kind}, not an array of rows", 'write [{"prompt": ..., "answer": ...}, ...]')
    for position, row in enumerate(values):
        location = f"{path} row {position + 1}"
        yield TableRow(position=position, location=location, values=_require_object(row, location))


def _csv_rows(path: Path, columns: Sequence[str] | None, without: str | None) -> Iterator[TableRow]:
    """The rows below a header; every cell is a text."""
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            repeated = [name for name in names if names.count(name) > 1]
            if repeated:
                raise NpoError(f"{path} has two columns {repeated[0]!r}", "name each column once in the first line")
            rows = (cells for cells in reader if cells)
            for position, cells in enumerate(rows):
                location = f"{path} line {reader.line_num}"
                if len(cells) != len(names):
                    raise NpoError(
                        f"{location} has {len(cells)} cells for {len(names)} columns",
                        "put cells with commas or line breaks in double quotes",
                    )
                yield TableRow(position=position, location=location, values=dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise NpoError(
            f"{path} line {reader.line_num} is not CSV: {error}", "write commas, and quotes in a cell twice"
        ) from error
    except UnicodeDecodeError as error:
        raise NpoError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error


def read_json_rows(path: Path, on_fault: Callable[[tuple[str, NpoError]], None]) -> list[TableRow]:
    """The rows of a .jsonl file that can be read; `on_fault` gets place and error of every other one."""
    rows: list[TableRow] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            location = f"{path} line {number}"
            try:
                if line.strip():
                    values = _json_object(line, location)
                    rows.append(TableRow(position=len(rows), location=location, values=values))
            except NpoError as error:
                on_fault((location, error))
    return rows


def _json_object(line: bytes, location: str) -> dict[str, Any]:
    try:
        value = _parse_json(line)
    except (ValueError, RecursionError) as error:
        raise NpoError(f"{location} is not valid JSON: {error}", "write one JSON object per line, in UTF-8") from error
    return _require_object(value, location)


def _parse_json(text: bytes) -> Any:
    """JSON as it is meant; decimals keep an answer such as 0.10 as it was written."""
    return json.loads(
        text.decode("utf-8-sig"),
        parse_float=Decimal,
        parse_constant=_refuse_constant,
        object_pairs_hook=_unique,
    )


def _require_object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NpoError(
            f"{location} is a JSON {_json_kind(value)}, not an object", 'write {"prompt": ..., "answer": ...}'
        )
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys, of which JSON readers would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _json_kind(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def read_parquet_column(path: Path, column: str) -> Iterator[Any]:
    """The cells of one column, with a few rows in memory at a time."""
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
        raise NpoError(f"{path} is not a readable parquet file: {error}", "write the file again") from error


def _parquet_rows(path: Path, columns: Sequence[str] | None, without: str | None) -> Iterator[TableRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NpoError(
            f"reading {path} needs the package pyarrow, which is not installed", "pip install pyarrow, or use .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            present = [name for name in names if (columns is None or name in columns) and name != without]
            num_rows = file.metadata.num_rows
            values = file.read(columns=present).to_pylist() if present else [{}] * num_rows
    except pyarrow.ArrowException as error:
        raise NpoError(f"{path} is not a readable parquet file: {error}", "write the file again") from error
    # Other columns are None: their names are needed for errors.
    for position, row in enumerate(values):
        rest = {name: None for name in names if name not in present}
        yield TableRow(position=position, location=f"{path} row {position + 1}", values=rest | row)


TableFormat = Literal["trl", "verl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedResponse:
    """A prompt and one response to it."""

    prompt: Prompt
    samples: PromptSamples
    rollout: Rollout
    """One of `samples`."""
    data_source: str
    """Name by which verl chooses its reward function."""


def validate_table_path(path: Path) -> None:
    """Raise unless the path ends in .parquet, does not exist, and its folder does."""
    if path.suffix != ".parquet":
        raise NpoError(f"--out {path} must end in .parquet", f"--out {quote_path(path)}.parquet")
    if path.exists():
        raise NpoError(f"--out {path} exists already", "name another file, or remove it")
    if not path.absolute().parent.is_dir():
        raise NpoError(f"--out {path}: there is no folder {path.parent}", f"mkdir -p {quote_path(path.parent)}")


def encode_table(path: Path, answers: Sequence[ExportedResponse], *, table_format: TableFormat) -> tuple[bytes, bool]:
    """The bytes of the table for `path`, and whether plain-text prompts had to be converted to chats."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NpoError(
            f"writing {path} needs the package pyarrow, which is not installed", "pip install pyarrow"
        ) from error
    chats = table_format == "verl" or any(each.prompt.messages for each in answers)
    has_images = any(each.prompt.images for each in answers)
    rows = [_row(each, number, chats=chats) for number, each in enumerate(answers)]
    turns = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    prompt_type = turns if chats else pyarrow.string()
    text, number = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        [
            *(("prompt", prompt_type), ("completion", prompt_type), ("reward", pyarrow.float32())),
            *(("data_source", text), ("ability", text)),
            ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pyarrow.struct([("split", text), ("index", number), ("prompt_id", text)])),
            *(("prompt_id", text), ("answer", text), ("response", text)),
            *(("response_ids", pyarrow.list_(number)), ("logps", pyarrow.list_(pyarrow.float32()))),
            *(("verdict", text), ("source", text), ("guide_step", number), ("finished", pyarrow.bool_())),
            *(("num_sampled", number), ("num_correct", number)),
            *(
                [("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])))]
                if has_images
                else []
            ),
        ]
    )
    with io.BytesIO() as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file)
        return file.getvalue(), chats and any(each.prompt.text is not None for each in answers)


def _row(each: ExportedResponse, number: int, *, chats: bool) -> dict[str, Any]:
    prompt, response = each.prompt, each.rollout
    messages = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    messages = messages or [{"role": "user", "content": prompt.text}]
    return {
        "prompt": messages if chats else prompt.text,
        "completion": [{"role": "assistant", "content": response.text}] if chats else response.text,
        "reward": response.reward,
        "data_source": prompt.dataset or each.data_source,
        "ability": each.data_source,
        "reward_model": {"style": "rule", "ground_truth": prompt.answer},
        "extra_info": {"split": "train", "index": number, "prompt_id": prompt.prompt_id},
        "prompt_id": prompt.prompt_id,
        "answer": prompt.answer,
        "response": response.text,
        "response_ids": list(response.response_ids),
        "logps": None if response.behavior_logps is None else list(response.behavior_logps),
        "verdict": response.verdict,
        "source": response.source,
        "guide_step": response.sampler_step,
        "finished": response.finished,
        "num_sampled": each.samples.num_sampled,
        "num_correct": each.samples.num_correct,
        "images": [{"bytes": load_image_bytes(image), "path": Path(image.location).name} for image in prompt.images],
    }
