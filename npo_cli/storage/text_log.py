"""log.txt of a run: what the commands that wrote to it said, for people. Nothing reads it.

One line each, with its time: start (version, process, command line), notices, warnings, and how the command ended.
Lines are only added. A line that cannot be written, as on a full disk, is left out: the log never fails a run.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from npo_cli import __version__
from npo_cli.api_key import redact_key
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError, StoppedEarly, first_line
from npo_cli.storage.files import now_utc
from npo_cli.storage.layout import RunDir

Kind = Literal["start", "notice", "warning", "stopped", "error", "end"]
MAX_WAITING = 100
_OPEN: list[Path] = []
"""Logs of the runs that this process holds, the innermost last."""
_WAITING: list[str] = []
"""Lines of a command that does not hold its run yet."""


@contextmanager
def log_command(run: RunDir) -> Iterator[None]:
    """Log the command that holds the run for the block: its start, what it says, and how it ends."""
    if not current_group().is_main:
        yield
        return
    path = run.text_log_path
    program = os.path.basename(sys.argv[0]).replace("__main__.py", "npo")
    command = " ".join([program, *sys.argv[1:]])
    append_line(path, format_line("start", f"npo {__version__}, process {os.getpid()}: {command}"))
    for line in _WAITING:
        append_line(path, line)
    _WAITING.clear()
    _OPEN.append(path)
    try:
        yield
    except StoppedEarly as error:
        append_line(path, format_line("stopped", error.message))
        raise
    except NpoError as error:
        append_line(path, format_line("error", f"{error.message}; try: {error.hint}" if error.hint else error.message))
        raise
    except (GeneratorExit, KeyboardInterrupt):
        append_line(path, format_line("stopped", "before its end"))
        raise
    except BaseException as error:
        append_line(path, format_line("error", f"{type(error).__name__}: {first_line(error)}"))
        raise
    else:
        append_line(path, format_line("end", ""))
    finally:
        _OPEN.remove(path)


def log_message(message: str, *, level: Literal["info", "warning"]) -> None:
    """Log a notice of the command; before it holds its run, the line waits until it does."""
    if not current_group().is_main:
        return
    line = format_line("warning" if level == "warning" else "notice", message)
    if _OPEN:
        append_line(_OPEN[-1], line)
    elif len(_WAITING) < MAX_WAITING:
        _WAITING.append(line)


def forget_waiting_lines() -> None:
    """A command begins: what an earlier one said that never held a run is not its own."""
    _WAITING.clear()


def format_line(kind: Kind, text: str) -> str:
    """`2026-11-23T07:30:00+00:00 notice  resume branch main`, in one line, without keys."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in redact_key(text))
    return f"{now_utc()} {kind:7} {shown}".rstrip()


def append_line(path: Path, line: str) -> None:
    """Add a line, whole or not at all."""
    data = f"{line}\n".encode("utf-8", "backslashreplace")
    with suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(handle).st_size
            if os.write(handle, data) < len(data):
                os.ftruncate(handle, before)
        finally:
            os.close(handle)
