"""`arms.json` in the folder of a bench: which runs lie there, under the names of their arms, so that it stands for all.

Paths in it are relative to the folder, which may be moved.
"""

from collections.abc import Sequence
from pathlib import Path

from npo_cli.errors import NpoError
from npo_cli.storage.files import read_json, write_json_atomic

BENCH_INDEX_FILE = "arms.json"


def save_bench_index(folder: Path, runs: Sequence[tuple[str, Path]]) -> None:
    """Arm and run of every cell, in the order of the table."""
    rows = [{"method": arm, "run": run.relative_to(folder).as_posix()} for arm, run in runs]
    write_json_atomic(folder / BENCH_INDEX_FILE, {"methods": rows})


def is_bench(folder: Path) -> bool:
    """Whether a bench was worked off here."""
    return (folder / BENCH_INDEX_FILE).is_file()


def load_bench_index(folder: Path) -> list[tuple[str, Path]]:
    """Arm and run directory, as they were saved."""
    try:
        return [(str(row["method"]), folder / row["run"]) for row in read_json(folder / BENCH_INDEX_FILE)["methods"]]
    except (KeyError, TypeError) as error:
        path = folder / BENCH_INDEX_FILE
        raise NpoError(f"{path} is not what npo bench writes", "the same npo bench again writes it anew") from error
