"""Heads: what a log must hold. Beside `X.jsonl` lies `X.jsonl.head` with lines, bytes and a running checksum.

A head is written when its log is sealed: at each checkpoint, at the end of a command, and after each line that must
not be lost. What it counts must be there, byte for byte; anything else is damage. Lines after it are those of a killed
command. The checksum continues from the old head, so sealing reads the new lines alone.
"""

import errno
import json
import os
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import (
    decode_record,
    explain_write_error,
    read_json,
    sync_path,
    to_row,
    write_json_atomic,
)
from npo_cli.storage.layout import RUN_INFO_FILE, head_path

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LogHead:
    """The sealed part of a log."""

    lines: int
    size: int
    """Bytes of these lines, newlines included."""
    crc32: int
    """zlib's CRC-32 of these bytes."""
    is_accepted: bool = False
    """Whether a user took the log as it was: what checkpoints and artifacts recorded of it does not hold."""


EMPTY = LogHead(lines=0, size=0, crc32=0)


def damaged_log_error(path: Path, detail: str) -> NpoError:
    """The error for a log that is not as it was written."""
    roots = [folder for folder in path.parents if (folder / RUN_INFO_FILE).exists()]
    verify = f"; what is whole: npo verify {quote_path(roots[0])}" if roots else ""
    return NpoError(f"{path} is damaged: {detail}", f"restore it from a copy of the run directory{verify}")


def read_head(path: Path) -> LogHead:
    """The head of a log; empty where neither is there yet."""
    there = head_path(path)
    if there.exists():
        return decode_record(LogHead, read_json(there), there)
    if path.exists():
        raise damaged_log_error(path, f"its head {there.name} is missing")
    return EMPTY


def check_size(path: Path, head: LogHead | None = None) -> LogHead:
    """The head of a log (or an older record of it) that is at least as long as it says; no line is read."""
    own = read_head(path)
    head = own if head is None or own.is_accepted else head
    if head.size and not path.exists():
        raise damaged_log_error(path, f"it is missing, and {head.lines:,} lines were written")
    if head.size and path.stat().st_size < head.size:
        raise damaged_log_error(path, _describe_difference(path, head))
    return head


def check_log(path: Path, head: LogHead | None = None) -> LogHead:
    """The head of a log (or an older record of it) whose bytes are those that were sealed."""
    head = check_size(path, head)
    if head.size:
        state = path.stat()
        if _checksum(path, head.size, (state.st_ino, state.st_size, state.st_mtime_ns)) != head.crc32:
            raise damaged_log_error(path, _describe_difference(path, head))
    return head


@lru_cache(maxsize=256)
def _checksum(path: Path, size: int, state: tuple[int, int, int]) -> int:
    """CRC-32 of the first bytes; computed once for one state of the file."""
    with path.open("rb") as file:
        found, left = 0, size
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            found, left = zlib.crc32(block, found), left - len(block)
    return found


def _describe_difference(path: Path, head: LogHead) -> str:
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number > head.lines:
                break
            if parse_line(line) is None:
                is_last = not line.endswith(b"\n")
                return f"line {number} of {head.lines:,} is {'cut off' if is_last else 'not a JSON object'}"
    if number < head.lines:
        return f"it has {number:,} lines, and {head.lines:,} were written"
    return f"its first {head.lines:,} lines are not those that were written"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in one line with its newline; None where it holds none."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def encode_head(head: LogHead) -> dict[str, Any]:
    """The head as JSON; `is_accepted` is left out where it is false."""
    return {name: value for name, value in to_row(head).items() if name != "is_accepted" or value}


@on_main_rank
def start_log(path: Path) -> None:
    """Write an empty head before the first line: a log without a head has lost it."""
    if not head_path(path).exists():
        if not path.parent.is_dir():  # a run directory that was moved away would begin again
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        write_json_atomic(head_path(path), encode_head(EMPTY))


@on_main_rank
def seal_log(path: Path, *, size: int | None = None) -> LogHead:
    """Force a log down to the disk and count its whole lines in its head, which is returned.

    A log that is shorter than its head keeps it: that is damage, which stays reported. `size`: lines after these bytes
    are not counted, for a log that grows meanwhile.
    """
    head = read_head(path)
    end = path.stat().st_size if path.exists() else 0
    end = end if size is None else min(end, size)
    if end <= head.size:
        return head
    lines, found, crc32 = head.lines, head.size, head.crc32
    with explain_write_error(path):
        with path.open("rb") as file:
            file.seek(found)
            for line in file:
                if not line.endswith(b"\n") or found + len(line) > end:
                    break
                lines, found, crc32 = lines + 1, found + len(line), zlib.crc32(line, crc32)
        sync_path(path)
    if found > head.size:
        head = replace(head, lines=lines, size=found, crc32=crc32)
        write_json_atomic(head_path(path), encode_head(head))
    return head


@on_main_rank
def rewrite_head(path: Path, *, size: int | None = None, is_accepted: bool = False) -> LogHead:
    """Let the head count the whole lines of the log's first `size` bytes (None: of all), whatever it said."""
    data = path.read_bytes()[:size]
    whole = data[: data.rfind(b"\n") + 1]
    head = LogHead(lines=whole.count(b"\n"), size=len(whole), crc32=zlib.crc32(whole), is_accepted=is_accepted)
    write_json_atomic(head_path(path), encode_head(head))
    return head
