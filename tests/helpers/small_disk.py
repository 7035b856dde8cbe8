"""A file system that is soon full."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mount_small_disk(place: Path, *, megabytes: int) -> Iterator[Path]:
    """A file system of that size in a new folder, for the block; skips the test where it may not be mounted."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"]
    mounting = subprocess.run(["mount", *options, place], capture_output=True, text=True)
    if mounting.returncode:
        pytest.skip(f"no right to mount a small disk: {mounting.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill_disk(disk: Path, *, leaving: int) -> Path:
    """A file that takes all the room but `leaving` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        file.truncate(max(0, file.tell() - leaving))
    return filler
