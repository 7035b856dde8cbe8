"""Append-only files of JSON lines. A line is complete when its newline is on disk.

Readers ignore a torn tail (a last line without newline or without valid JSON, left by a killed writer); a writer
removes it before its first line. Nothing else in a log is ever changed. One writer at a time: see `lock.py`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError
from npo_cli.storage.files import decode_record, encode_record, explain_full_disk, make_folder, sync_path

T = TypeVar("T")
AppendResult = Literal["written", "same", "differs"]
KeyFields = str | tuple[str, ...]


@dataclass(slots=True)
class JsonlLog:
    """One file of JSON lines. A missing file reads as empty; the first write creates it and removes a torn tail."""

    path: Path
    _repaired: bool = field(default=False, init=False)
    _held: dict[KeyFields, dict[tuple[object, ...], str]] = field(default_factory=dict, init=False)
    """Lines already there by the values of their key, for each key that `append_once` was called with."""

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Every whole line, oldest first."""
        for _, row in iter_complete_lines(self.path):
            yield row

    def read_records(self, kind: type[T]) -> list[T]:
        """Every whole line as a record; a line that is none is damage, and is named."""
        return [
            decode_record(kind, row, f"{self.path}, line {number}")
            for number, row in enumerate(self.iter_rows(), start=1)
        ]

    @on_main_rank
    def append(self, record: object) -> None:
        """Add one line. Called without `sync`, it survives a killed process but perhaps not a power cut."""
        line = encode_record(record)
        self._write([line])
        self._held.clear()

    @on_main_rank
    def append_once(self, record: object, key: KeyFields = "step") -> AppendResult:
        """Add a line unless one with the same key is there: then compare the two, and write nothing.

        Resuming executes again what came after the last checkpoint; `differs` says that it was not repeated exactly.
        """
        line = encode_record(record)
        held = self._lines_by(key)
        place = _key_of(json.loads(line), key)
        if place in held:
            return "same" if held[place] == line else "differs"
        self._write([line])
        held[place] = line
        return "written"

    @on_main_rank
    def extend(self, records: list[object]) -> None:
        """Add several lines in one write."""
        self._write([encode_record(record) for record in records])
        self._held.clear()

    @on_main_rank
    def repair(self) -> int:
        """Cut off a torn tail; returns the number of bytes removed."""
        self._repaired = True
        return truncate_file(self.path, measure_complete_size(self.path)) if self.path.exists() else 0

    def sync(self) -> None:
        """Force every line down to the disk."""
        sync_log(self.path)

    def _lines_by(self, key: KeyFields) -> dict[tuple[object, ...], str]:
        if not self._repaired:
            self.repair()
        if key not in self._held:
            self._held[key] = {_key_of(row, key): line for line, row in iter_complete_lines(self.path)}
        return self._held[key]

    def _write(self, lines: list[str]) -> None:
        if not self._repaired:
            self.repair()
        with explain_full_disk(self.path):
            make_folder(self.path.parent)
            append_bytes(self.path, "".join(line + "\n" for line in lines).encode("ascii"))


@on_main_rank
def truncate_file(path: Path, size: int) -> int:
    """Cut off what comes after the first `whole` bytes; returns the number of bytes removed."""
    torn = path.stat().st_size - size
    if torn > 0:
        os.truncate(path, size)
        sync_path(path)
    return torn


def sync_log(path: Path) -> None:
    """Force what was written so far down to the disk, if anything was."""
    if path.exists():
        with explain_full_disk(path):
            sync_path(path)


@on_main_rank
def append_bytes(path: Path, data: bytes) -> None:
    """Add bytes at the end of a file: all of them, or, when the disk is full, none."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            while data:
                data = data[os.write(handle, data) :]
        except OSError:
            # What cannot be taken back is a torn tail, which the next writer cuts off.
            with suppress(OSError):
                os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def iter_complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with the object in it. Damage before the last line is an error that names the line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        broken_at: int | None = None
        for number, line in enumerate(file, start=1):
            if broken_at is not None:
                raise NpoError(
                    f"{path}, line {broken_at}: not a JSON object",
                    "restore the file from a copy, or remove that line by hand",
                )
            row = parse_line(line)
            if row is None:
                broken_at = number
            else:
                yield line[:-1].decode("utf-8"), row


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in one line with its newline; None where the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def measure_complete_size(path: Path, *, start: int = 0) -> int:
    """Bytes up to and including the last whole line, looking from the line at `start` on.

    Only the last line is doubted, as only it can be torn.
    """
    size = last_start = start
    last = b""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            last_start, last = size, line
            size += len(line)
    return size if not last or parse_line(last) is not None else last_start


def _key_of(row: dict[str, Any], key: KeyFields) -> tuple[object, ...]:
    return tuple(row.get(name) for name in ((key,) if isinstance(key, str) else key))
