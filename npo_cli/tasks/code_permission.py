"""Which user code may run: what --allow-code allowed, kept per run and per content of the file, on this machine.

`--allow-code` is given once: the run's id, the file and its sha256 are then one line of
`$XDG_STATE_HOME/npo/allowed_code.jsonl` (`~/.local/state`). The line is outside of the run directory, so a run
directory that comes from elsewhere permits nothing here, whatever is written in it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

Permissions = Mapping[str, frozenset[str]]
"""File -> the sha256 of every content that may run."""
_PERMISSIONS: ContextVar[Permissions | None] = ContextVar("permissions", default=None)


def permission_file() -> Path:
    """Where permissions are kept for this user."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "npo" / "allowed_code.jsonl"


def read_permissions(run_id: str) -> Permissions:
    """What may run in this run. A line that cannot be read permits nothing."""
    found: dict[str, frozenset[str]] = {}
    try:
        lines = permission_file().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["run"] == run_id:
                found[entry["file"]] = found.get(entry["file"], frozenset()) | {entry["sha256"]}
    return found


def record_permissions(run_id: str, files: Iterable[Path]) -> None:
    """Let these files, as they are now, run in this run without --allow-code.

    Where the file of permissions cannot be written, --allow-code is needed again.
    """
    known, path = read_permissions(run_id), permission_file()
    entries = [{"run": run_id, "file": str(file), "sha256": hash_code(file)} for file in files]
    new = [each for each in entries if each["sha256"] not in known.get(each["file"], ())]
    if not new:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write("".join(json.dumps(each) + "\n" for each in new).encode())  # one write: commands may run at once


@contextmanager
def recorded_permissions(permissions: Permissions) -> Iterator[None]:
    """The permissions of a run hold within the block."""
    before = _PERMISSIONS.set(permissions)
    try:
        yield
    finally:
        _PERMISSIONS.reset(before)


def is_permitted(file: Path) -> bool:
    """Whether a file's present content was allowed in the run that is open."""
    allowed = (_PERMISSIONS.get() or {}).get(str(file))
    return bool(allowed) and file.is_file() and hash_code(file) in allowed


def has_changed(file: Path) -> bool:
    """Whether another content of the file was allowed in the run that is open."""
    return str(file) in (_PERMISSIONS.get() or {}) and not is_permitted(file)


def hash_code(file: Path) -> str:
    """sha256 of a file, without what it imports."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
