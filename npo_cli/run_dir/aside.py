"""Folders that appear whole or not at all: built under a hidden name beside the wanted one, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npo_cli.run_dir.lock import lock_run
from npo_cli.run_dir.paths import RunDir, check_unused

UNFINISHED_SUFFIX = ".unfinished"


@contextmanager
def atomic_directory(root: Path, *, flag: str = "--run") -> Iterator[Path]:
    """A hidden sibling that becomes `root` when the block ends well, else it is removed.

    What a killed writer left is removed; one that is still at work there is refused by its lock.
    """
    check_unused(root, flag=flag)
    hidden = root.absolute().parent / f".{root.name}{UNFINISHED_SUFFIX}"
    if hidden.exists():
        with lock_run(RunDir(hidden)):
            shutil.rmtree(hidden)
    made = [folder for folder in hidden.parents if not folder.exists()]
    hidden.mkdir(parents=True)
    try:
        yield hidden
        check_unused(root, flag=flag)
        hidden.rename(root.absolute())
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
