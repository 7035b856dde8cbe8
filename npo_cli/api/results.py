"""The results of a command as a file: what `--out FILE` means everywhere."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from npo_cli.api.rows import Row, list_columns, to_row


def name_record(record: Any) -> str:
    """The name of its type: `candidate_score`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(record).__name__).lower()


def to_named_row(record: Any) -> Row:
    """A record as plain data with the name of its type in `record`, as `--json` prints it."""
    return {"record": name_record(record), **to_row(record)}


def save_results(records: Iterable[Any], path: Path, *, of: type) -> None:
    """Write the records, replacing the file whole; the suffix decides.

    `.jsonl`: every record on a line, as `--json` prints them. `.json`: a list of the same. `.csv`: the records of the
    kind `of`, one per line; unknown values are empty, values of several parts are JSON.
    """
    from npo_cli.storage.files import write_text_atomic

    every = list(records)
    match path.suffix.lower():
        case ".jsonl":
            text = "".join(f"{json.dumps(to_named_row(record), allow_nan=False)}\n" for record in every)
        case ".json":
            text = json.dumps([to_named_row(record) for record in every], allow_nan=False, indent=1) + "\n"
        case _:
            text = "".join(_format_csv([to_row(record) for record in every if type(record) is of], of))
    write_text_atomic(path, text)


def _format_csv(rows: list[Row], kind: type) -> Iterator[str]:
    """A header with every column that any row has, then the rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row)) or list_columns(kind)
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_format_cell(row.get(name)) for name in columns] for row in rows)
        yield file.getvalue()


def _format_cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list | bool) else value
