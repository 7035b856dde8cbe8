"""Keeps a command alive as long as its parent, and not a moment longer: `keeper FOLDER COMMAND ...`

The parent holds the other end of this process's stdin. Whatever becomes of the parent, `kill -9` too, the pipe closes,
and the command with all its children is ended: they are one process group of their own. In the end FOLDER, which the
command worked in, is removed. Knows nothing of engines.

A limit on calls that nothing inside this process can interrupt: past it the process says why, and ends.

A stage leaves whole lines and whole checkpoints at every moment, so ending here is as safe as `kill -9`.

Folders that an engine works in: gone when the block ends, and after a `kill -9` when an engine next wants one.

Whose process lives is told by a lock in the folder, which the operating system takes back from the dead. A process
number in the name would not do: another process may have it by now, or have it in another container.

What a foreign library says while it starts is kept off the terminal: its errors are exceptions, and told as such.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

TERMINATE_GRACE_SECONDS = 5.0
"""Seconds between asking a group to end and ending it."""


def main(folder: str, command: list[str]) -> int:
    """Run the command; end it when stdin ends. The exit code is the command's."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(child.pid,), daemon=True).start()
    # A signal to this process is for the group.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end_group(child.pid))
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # what the command left behind
    shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _end_with_parent(group: int) -> None:
    while os.read(0, 4096):
        pass
    _end_group(group)


def _end_group(group: int) -> None:
    _signal_group(group, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATE_GRACE_SECONDS
    while time.monotonic() < deadline and _signal_group(group, 0):
        time.sleep(0.05)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Whether anybody was there to be told."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))


TIMEOUT_EXIT_CODE = 1


@contextmanager
def exit_on_timeout(seconds: float, *, phase: str, hint: str) -> Iterator[None]:
    """Run the block; if it is still running after `seconds`, name the phase on stderr and leave the process."""
    # Whatever becomes of stderr in the meantime.
    terminal = os.dup(2)
    words = f"error: the engine hung while it was to {phase}: nothing after {seconds:g} s\n  try: {hint}\n"
    timer = threading.Timer(seconds, exit_process, (terminal, words))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.close(terminal)


def exit_process(terminal: int, words: str) -> None:
    """The end of a process whose engine hangs."""
    os.write(terminal, words.encode())
    os._exit(TIMEOUT_EXIT_CODE)


SCRATCH_PREFIX = "npo-scratch-"
LOCK_NAME = "held.lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder with nothing but its lock; those that nobody holds any more are removed on the way."""
    remove_stale_folders()
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
    try:
        with FileLock(folder / LOCK_NAME):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_folders() -> None:
    """Remove what killed processes left; other people's folders are left to them."""
    for held in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*/{LOCK_NAME}"):
        with suppress(Timeout, PermissionError), FileLock(held, timeout=0):
            shutil.rmtree(held.parent, ignore_errors=True)


@contextmanager
def suppress_output() -> Iterator[None]:
    """Standard output and error of this process, C++ included, go into a file that nobody reads."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
