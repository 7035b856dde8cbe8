"""`methods.json` in the folder of a bench: its runs by method, so that the folder can stand for all of them.

Paths in it are relative to the folder, which may be moved.
"""

from collections.abc import Sequence
from pathlib import Path

from npo_cli.errors import NpoError
from npo_cli.storage.files import read_json, write_json_atomic

BENCH_INDEX_FILE = "methods.json"
DONE_FILE = "done.json"
"""Beside a finished run: the commands that made it."""


def save_commands(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Record that these npo commands made the run in this folder."""
    write_json_atomic(folder / DONE_FILE, {"commands": [list(command) for command in commands]})


def load_commands(folder: Path) -> list[tuple[str, ...]] | None:
    """The npo commands that made the run in this folder; None before it is finished."""
    path = folder / DONE_FILE
    if not path.exists():
        return None
    return [tuple(map(str, command)) for command in read_json(path)["commands"]]


def save_bench_index(folder: Path, runs: Sequence[tuple[str, Path]]) -> None:
    """Method and run directory of every run, in the order of the table."""
    rows = [{"method": method, "run": run.relative_to(folder).as_posix()} for method, run in runs]
    write_json_atomic(folder / BENCH_INDEX_FILE, {"methods": rows})


def is_bench(folder: Path) -> bool:
    """Whether the folder is the output of `npo bench`."""
    return (folder / BENCH_INDEX_FILE).is_file()


def load_bench_index(folder: Path) -> list[tuple[str, Path]]:
    """Method and run directory, as saved."""
    try:
        return [(str(row["method"]), folder / row["run"]) for row in read_json(folder / BENCH_INDEX_FILE)["methods"]]
    except (KeyError, TypeError) as error:
        path = folder / BENCH_INDEX_FILE
        raise NpoError(f"{path} is not what npo bench writes", "run the same npo bench again to rewrite it") from error
