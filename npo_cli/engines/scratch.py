"""Folders that an engine works in: gone when the block ends, and after a `kill -9` when an engine next wants one.

Whose process lives is told by a lock in the folder, which the operating system takes back from the dead. A process
number in the name would not do: another process may have it by now, or have it in another container.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

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
