"""Bytes on disk: canonical JSON, atomic replacement of files, syncing, and errors of writing.

Which file is where is the subject of `layout.py`. JSON here is ASCII, without blanks, keys in the order
given, and never holds NaN or infinity (JSON has no such numbers): such a value is dropped and named.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache, wraps
from pathlib import Path
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError, RunFailed

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
HASH_BLOCK_BYTES = 1 << 20

T = TypeVar("T")
P = ParamSpec("P")
MAX_CACHED_FILES = 64
DELETED_SUFFIX = ".dead"
"""Of the hidden name of a folder that is being deleted."""
CHECKSUM = ',\n "checksum": '
"""Precedes the CRC-32 of a document, which covers everything before this."""


def now_utc() -> str:
    """The time, ISO 8601 in UTC to the second: `2026-11-23T07:30:00+00:00`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_row(record: object) -> dict[str, Any]:
    """A record's fields, or a mapping's items, as one flat dict; nested records become dicts too."""
    if is_dataclass(record):
        return {spec.name: _plain(getattr(record, spec.name)) for spec in fields(record)}
    assert isinstance(record, Mapping), f"neither a record nor a mapping: {type(record)}"
    return {str(name): _plain(value) for name, value in record.items()}


def _plain(value: object) -> object:
    if is_dataclass(value) or isinstance(value, Mapping):
        return to_row(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def encode_record(record: object) -> str:
    """One line of JSON without its newline. Non-finite numbers are left out and their dotted names listed in `dropped`.

    In a list the place is kept and holds null. A record without such numbers has no `dropped`.
    """
    try:
        return _dump(record)
    except ValueError:
        dropped: list[str] = []
        finite = _finite(json.loads(_dump(record, allow_nan=True)), "", dropped)
        return _dump(finite | {"dropped": dropped})


def _dump(record: object, *, allow_nan: bool = False) -> str:
    return json.dumps(record, ensure_ascii=True, separators=(",", ":"), allow_nan=allow_nan, default=to_row)


def _finite(value: Any, name: str, dropped: list[str]) -> Any:
    """The same value without NaN and infinity; the names of those go to `dropped`."""
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            inner = f"{name}.{key}" if name else key
            if isinstance(item, float) and not math.isfinite(item):
                dropped.append(inner)
            else:
                kept[key] = _finite(item, inner, dropped)
        return kept
    if isinstance(value, list):
        return [_finite(item, f"{name}[{index}]", dropped) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        dropped.append(name)
        return None
    return value


def decode_record(kind: type[T], row: Mapping[str, Any], source: Path | str) -> T:
    """A record from a row of `source`: unknown fields are ignored, a dropped number reads as NaN.

    A field that is absent or of another type is damage, and `source` (a file, perhaps with a line) is named.
    """
    specs = _json_fields(kind)
    values = {name: value for name, value in row.items() if name in specs}
    if "dropped" in row:
        values |= {name: math.nan for name in row["dropped"] if name in specs}
    for name, (accepted, words, is_required) in specs.items():
        if name not in values:
            if is_required:
                raise damaged_file_error(source, f"it has no field {name!r}")
        elif not _fits(values[name], accepted, words):
            raise damaged_file_error(source, f"{name} is {values[name]!r}")
    return kind(**values)


def damaged_file_error(source: Path | str, detail: str) -> NpoError:
    """The error for a damaged file of the run directory."""
    return NpoError(f"{source} is damaged: {detail}", "restore it from a copy of the run directory")


def check_time(row: Mapping[str, Any], name: str, source: Path | str) -> None:
    """Refuse a field that is not a time of `now_utc`. Times are for people; nothing is ordered by them."""
    try:
        is_time = datetime.fromisoformat(row[name]).tzinfo is not None
    except (KeyError, TypeError, ValueError):
        is_time = False
    if not is_time:
        raise damaged_file_error(source, f"{name} is {row.get(name)!r}, which is not a time")


def check_range(record: object, names: Iterable[str], source: Path | str, *, high: float = math.inf) -> None:
    """Refuse a record of `source` with a number below 0 or above `high` in one of these fields; None and NaN pass."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not (math.isnan(value) or 0 <= value <= high):
            raise damaged_file_error(source, f"{name} is {value!r}")


def _fits(value: object, accepted: tuple[type, ...], words: frozenset[str]) -> bool:
    """Whether it is of one of the types, or one of the words; true and false are no numbers."""
    if isinstance(value, bool):
        return bool in accepted
    return isinstance(value, accepted) or (isinstance(value, str) and value in words)


@cache
def _json_fields(kind: type) -> dict[str, tuple[tuple[type, ...], frozenset[str], bool]]:
    """By field of a record the types and the words that json reads for it, and whether it must be there. Items of lists
    are not checked."""
    return {
        spec.name: (
            _json_types(spec.type),
            _words(spec.type),
            spec.default is MISSING and spec.default_factory is MISSING,
        )
        for spec in fields(kind)  # type: ignore[arg-type]
    }


def _words(wanted: Any) -> frozenset[str]:
    """The strings that a type names one by one."""
    if get_origin(wanted) in (Union, UnionType):
        return frozenset(word for option in get_args(wanted) for word in _words(option))
    return frozenset(get_args(wanted)) if get_origin(wanted) is Literal else frozenset()


def _json_types(wanted: Any) -> tuple[type, ...]:
    """What json reads for a type: a list for a tuple, a dict for a mapping, a whole number also for a number."""
    origin = get_origin(wanted) or wanted
    if origin in (Union, UnionType):
        return tuple(kind for option in get_args(wanted) for kind in _json_types(option))
    if origin is Literal:
        return ()
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return (dict,)
    return {float: (float, int), tuple: (list, tuple)}.get(origin, (origin,))


def cached_by_file(path_of: Callable[P, Path]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Call a reader of one file again only when the file has changed. Callers share the result and must not change it.

    Logs only grow and documents are replaced by another file, so that size, inode and time tell the versions apart.
    """

    def decorate(read: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(MAX_CACHED_FILES)
        def read_version(version: object, *args: Any, **names: Any) -> T:
            return read(*args, **names)

        @wraps(read)
        def read_if_changed(*args: P.args, **names: P.kwargs) -> T:
            try:
                found = os.stat(path_of(*args, **names))
                version = (found.st_ino, found.st_size, found.st_mtime_ns)
            except FileNotFoundError:
                version = None
            return read_version(version, *args, **names)

        return read_if_changed

    return decorate


def read_json(path: Path) -> dict[str, Any]:
    """The object in a whole-file JSON document; anything else is an error that names the file."""
    try:
        data = path.read_bytes()
        found = json.loads(data)
    except FileNotFoundError as error:
        raise NpoError(f"{path} is missing", "restore it from a copy of the run directory") from error
    except (ValueError, RecursionError) as error:
        raise damaged_file_error(path, str(error)) from error
    if not isinstance(found, dict):
        raise damaged_file_error(path, "it holds no JSON object")
    check_text(path, data, CHECKSUM)
    found.pop("checksum", None)
    return found


def check_text(path: Path, data: bytes, mark: str) -> None:
    """Refuse a document with another checksum after `mark` than that of what comes before it. Without a mark, a person
    has written it."""
    text, _, checksum = data.rpartition(mark.encode())
    digits = checksum.rstrip(b"\n}")
    if text and digits.isdigit() and int(digits) != zlib.crc32(text):
        raise damaged_file_error(path, "it does not fit its checksum (remove that if it was changed on purpose)")


def write_json_atomic(path: Path, document: object) -> None:
    """Replace a JSON document whole: a reader sees the old one or the new one. Indented by one blank.

    Its last field is a checksum of what comes before it, by which a changed document is recognized.
    """
    finite = json.loads(encode_record(document))
    assert finite, f"{path} would be empty"
    text = json.dumps(finite, ensure_ascii=True, indent=1, allow_nan=False).removesuffix("\n}")
    write_text_atomic(path, f"{text}{CHECKSUM}{zlib.crc32(text.encode())}\n}}\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file whole, as UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


@on_main_rank
def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a hidden neighbour, sync it, rename it over `path`, sync the folder."""
    with explain_write_error(path):
        make_folder(path.parent)
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with hidden.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


@on_main_rank
def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, each name synced into its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_path(folder.parent)


def sync_path(path: Path) -> None:
    """Force a file, or the names in a folder, down to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete_atomically(folder: Path) -> None:
    """Rename a folder to a hidden name, sync, and only then delete its files, with what a killed deletion left."""
    dead = folder.parent / f".{folder.name}{DELETED_SUFFIX}"
    shutil.rmtree(dead, ignore_errors=True)
    folder.rename(dead)
    sync_path(dead.parent)
    shutil.rmtree(dead, ignore_errors=True)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    summed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            summed.update(block)
    return summed.hexdigest()


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full. safetensors raises its own error with the number in the text."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL_ERRNOS
    text = str(error)
    return any(f"os error {number}" in text or f"code: {number}," in text for number in DISK_FULL_ERRNOS)


@contextmanager
def explain_write_error(path: Path) -> Iterator[None]:
    """Turn a full disk, and a folder that is no longer there, into one clear error; other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise RunFailed(
                f"no room left to write {path}; everything saved before is intact",
                "free some disk space, then run `npo resume` on this run directory",
            ) from error
        gone = [folder for folder in path.absolute().parents if not folder.exists()]
        if not gone:
            raise
        raise RunFailed(
            f"{gone[-1]} was renamed or deleted while npo was writing in it",
            "put it back, or use its new name: npo resume RUN continues from its newest checkpoint",
        ) from error


@on_main_rank
def check_disk_space(path: Path, num_bytes: int) -> None:
    """Refuse a write of `num_bytes` bytes that the file system under `path` cannot hold."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RunFailed(
            f"{path} needs {num_bytes / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB left",
            "free some disk space or lower train.keep_full_checkpoints and train.keep_weights_only, then run `npo "
            "resume`",
        )
