"""Append-only files of JSON lines. A line is complete when its newline is on disk.

Readers ignore a torn tail (a last line without newline, left by a killed writer); a writer removes it before its first
line. Nothing else in a log is ever changed. A bad line with a newline is damage, and so is a log that does not hold
what its head counts (`log_head.py`). One writer at a time: see `lock.py`.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import decode_record, encode_record, explain_write_error, sync_path
from npo_cli.storage.log_head import (
    LogHead,
    check_log,
    check_size,
    damaged_log_error,
    parse_line,
    read_head,
    rewrite_head,
    seal_log,
    start_log,
)

T = TypeVar("T")
AppendResult = Literal["written", "same", "differs"]
KeyFields = str | tuple[str, ...]


@dataclass(slots=True)
class JsonlLog:
    """One file of JSON lines. A missing file reads as empty; the first write creates it and removes a torn tail.

    It never creates a folder: a run directory that was moved away would begin again.
    """

    path: Path
    _repaired: bool = field(default=False, init=False)
    _held: dict[KeyFields, dict[tuple[object, ...], bytes]] = field(default_factory=dict, init=False)
    """Digests of the lines already there by the values of their key, for each key that `append_once` was called
    with."""

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
            return "same" if held[place] == _digest(line) else "differs"
        self._write([line])
        held[place] = _digest(line)
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
        head = check_size(self.path)
        return cut_log(self.path, measure_complete_size(self.path, start=head.size)) if self.path.exists() else 0

    def sync(self) -> None:
        """Force every line down to the disk."""
        if self.path.exists():
            with explain_write_error(self.path):
                sync_path(self.path)

    def seal(self) -> LogHead:
        """The same, and from now on every line must be there."""
        return seal_log(self.path)

    def _lines_by(self, key: KeyFields) -> dict[tuple[object, ...], bytes]:
        if not self._repaired:
            self.repair()
        if key not in self._held:
            self._held[key] = {_key_of(row, key): _digest(line) for line, row in iter_complete_lines(self.path)}
        return self._held[key]

    def _write(self, lines: list[str]) -> None:
        if not self._repaired:
            self.repair()
        with explain_write_error(self.path):
            start_log(self.path)
            append_bytes(self.path, "".join(line + "\n" for line in lines).encode("ascii"))


@on_main_rank
def cut_log(path: Path, size: int) -> int:
    """Cut off what comes after the first `size` bytes; returns the number of bytes removed."""
    torn = path.stat().st_size - size
    if torn > 0:
        if size < read_head(path).size:
            rewrite_head(path, size=size)
        os.truncate(path, size)
        sync_path(path)
    return torn


@on_main_rank
def append_bytes(path: Path, data: bytes) -> None:
    """Add bytes at the end of a file: all of them, or, when the disk is full, none."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
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
    """Each whole line with the object in it. Damage is an error that names the line."""
    head = check_log(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        size = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            row = parse_line(line)
            if row is None:
                if size < head.size:
                    raise damaged_log_error(path, f"line {number} is not a JSON object")
                raise NpoError(
                    f"{path}, line {number}: not a JSON object, left by a killed command",
                    f"cut it off with what follows: truncate -s {size} {quote_path(path)}",
                )
            size += len(line)
            yield line[:-1].decode("utf-8"), row


def measure_complete_size(path: Path, *, start: int = 0) -> int:
    """Bytes up to and including the last whole line, looking from the line at `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        return start + sum(len(line) for line in file if line.endswith(b"\n"))


def _digest(line: str) -> bytes:
    return hashlib.blake2b(line.encode("utf-8"), digest_size=16).digest()


def _key_of(row: dict[str, Any], key: KeyFields) -> tuple[object, ...]:
    return tuple(row.get(name) for name in ((key,) if isinstance(key, str) else key))
