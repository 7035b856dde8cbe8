"""Rows of another trainer's metrics: JSON lines, a Trainer's state, CSV exports, TensorBoard event files, or a folder.

Known: `trainer_state.json` of Hugging Face's Trainer and of TRL, the JSON lines of verl and prime-rl, CSV as
wandb exports it (a run's history, or the data of one chart), TensorBoard's event files (with the extra `tensorboard`).
In a folder all files of the first kind that is there are read: rows of one step add up.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from npo_cli.errors import NpoError

Row = Mapping[str, Any]

TRAINER_STATE = "trainer_state.json"
EVENT_FILES = "events.out.tfevents."
"""How the names of TensorBoard's event files begin."""
FORMS = "a run directory, or the metrics of a trainer: .jsonl, .csv, trainer_state.json, TensorBoard event files"
_CHART_COLUMN = re.compile(r"^.+ - (?P<metric>\S+)$")
"""wandb names the columns of a chart's export `RUN - METRIC`, with `__MIN` and `__MAX` beside each."""


def read_rows(path: Path) -> list[Row]:
    """Every record of a file or folder as one flat row, in the order of the file."""
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> list[Row]:
    if path.name.startswith(EVENT_FILES):
        return read_event_files(path)
    text = _read_text(path)
    rows = _parse_csv(text, path) if path.suffix.lower() == ".csv" else _parse_json(text, path)
    if not rows:
        raise NpoError(f"{path} is empty", "it needs one record per line, each with step, reward and entropy")
    return [_flatten(row) for row in rows]


def _read_folder(folder: Path) -> list[Row]:
    """Event files, else the newest trainer state, else CSV files, else JSON lines."""
    if any(folder.rglob(EVENT_FILES + "*")):
        return read_event_files(folder)
    states = [folder / TRAINER_STATE, *sorted(folder.glob(f"checkpoint-*/{TRAINER_STATE}"), key=_checkpoint_step)[::-1]]
    for path in states:
        if path.is_file():
            return _read_file(path)
    for pattern in ("*.csv", "*.jsonl"):
        if found := sorted(folder.glob(pattern)):
            return [row for path in found for row in _read_file(path)]
    raise NpoError(f"{folder} has no metrics that can be read", f"name {FORMS}")


def _checkpoint_step(path: Path) -> int:
    digits = path.parent.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NpoError(f"{path} is not UTF-8 text (byte {error.start})", f"name {FORMS}") from error
    except OSError as error:
        raise NpoError(
            f"{path} cannot be read: {error.strerror}", "check its permissions, or name another file"
        ) from error


# JSON


def _parse_json(text: str, path: Path) -> list[Row]:
    """JSON lines, of which a torn last one is skipped; or one object with a `log_history`."""
    lines = text.split("\n")
    history = _history(text) if _parse(lines[0]) is None or len(lines) <= 2 else None
    return _parse_lines(lines, path) if history is None else history


def _parse_lines(lines: Sequence[str], path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and (number < len(lines) or not rows):
            raise NpoError(
                f"{path}, line {number}: not a JSON object", f"write one JSON object per line, or name {FORMS}"
            )
    return rows


def _history(text: str) -> list[Row] | None:
    """The log_history of a trainer state; None for any other text."""
    found = (_parse(text) or {}).get("log_history")
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else None


def _parse(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _flatten(row: Row) -> Row:
    """Nested objects are merged one level up: verl writes {"step": 1, "data": {...}}."""
    inner = {name: value for group in row.values() if isinstance(group, dict) for name, value in group.items()}
    return {**inner, **row}


# CSV


def _parse_csv(text: str, path: Path) -> list[Row]:
    """One row per line; empty cells are missing. A chart's export must hold one run."""
    reader = csv.reader(text.splitlines())
    try:
        header, *lines = list(reader) or [[]]
    except csv.Error as error:
        raise NpoError(f"{path}, line {reader.line_num}: {error}", f"name {FORMS}") from error
    names = _name_columns(header, path)
    return [
        {name: _read_cell(cell) for name, cell in zip(names, line, strict=False) if name and cell.strip()}
        for line in lines
    ]


def _name_columns(header: Sequence[str], path: Path) -> list[str]:
    """The metric of each column; empty for those that are left out."""
    if not header or header[0] != "Step":
        return list(header)
    names = [""] * len(header)
    for place, title in enumerate(header[1:], start=1):
        match = _CHART_COLUMN.match(title)
        if match and not title.endswith(("__MIN", "__MAX")):
            names[place] = match["metric"]
    found = [name for name in names if name]
    if len(set(found)) < len(found):
        raise NpoError(f"{path} has several runs", "export the chart of one run")
    return ["step", *names[1:]]


def _read_cell(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


# TensorBoard


def read_event_files(path: Path) -> list[Row]:
    """The scalars of one event file, or of all in a folder: one row per tag and step."""
    load = _open_event_files()
    files = [path] if path.is_file() else sorted(path.rglob(EVENT_FILES + "*"))
    rows = [{"step": step, tag: value} for file in files for tag, step, value in load(file)]
    if not rows:
        raise NpoError(f"{path} has no scalars", f"name {FORMS}")
    return rows


def _open_event_files() -> Callable[[Path], Iterable[tuple[str, int, float]]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    except ImportError as error:
        raise NpoError(
            "TensorBoard event files need the package tensorboard", "pip install 'npo-cli[tensorboard]'"
        ) from error

    def load(path: Path) -> Iterable[tuple[str, int, float]]:
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
        for tag in events.Tags()[SCALARS]:
            for event in events.Scalars(tag):
                yield tag, event.step, event.value

    return load
