"""Time from Enter to the first training step: `npo train micro RUN`, until the record of step 1 is printed.

    python recipes/first_step.py [TREE ...] [--turns 7] [--out FILE.csv]

TREE is a folder with the package, such as a clone at another commit; without one the installed package is measured.
Several trees take turns (A B A B ...). Wall clock and CPU seconds are those of the whole process, which is killed once
it has printed the record; quoted are medians, and the median over the turns of the ratio to the first tree. One turn
before the first is not counted: it writes byte code and fills the cache of files.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

COMMAND = ("-m", "npo_cli", "train", "micro")
SETTINGS = ("train.num_steps=1", "--json")


def time_first_step(tree: Path | None, folder: Path) -> tuple[float, float]:
    """Wall clock and CPU seconds from the start of the process to the record of step 1."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["OMP_NUM_THREADS"] = "1"
    if tree is not None:
        environment["PYTHONPATH"] = str(tree.absolute())
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *COMMAND, str(folder / "run"), *SETTINGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=folder,
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if json.loads(line).get("record") == "step_report":
            break
    else:
        raise SystemExit(process.stderr.read().decode())
    wall = time.perf_counter() - began
    process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return wall, usage.ru_utime + usage.ru_stime


def measure_trees(trees: Sequence[Path | None], turns: int) -> Iterator[dict[str, str | float]]:
    """One row per turn and tree, the trees in turn."""
    for turn in range(turns + 1):
        for tree in trees:
            with tempfile.TemporaryDirectory() as folder:
                wall, cpu = time_first_step(tree, Path(folder))
            if turn:
                row = {"turn": turn, "tree": str(tree or "installed"), "wall": round(wall, 2), "cpu": round(cpu, 2)}
                print(*(f"{value:>12}" for value in row.values()), file=sys.stderr, flush=True)
                yield row


def summarize(rows: Sequence[dict[str, str | float]], trees: Sequence[str]) -> Iterator[str]:
    """Medians of each tree, and its ratio to the first, turn by turn."""
    for tree in trees:
        parts = []
        for kind in ("wall", "cpu"):
            own, first = ([float(row[kind]) for row in rows if row["tree"] == name] for name in (tree, trees[0]))
            ratio = statistics.median(one / other for one, other in zip(own, first, strict=True))
            parts.append(f"{kind} {statistics.median(own):.2f} s ({min(own):.2f} to {max(own):.2f}), ratio {ratio:.2f}")
        yield f"{tree}: {'; '.join(parts)}"


def main() -> None:
    """Measure, print the medians, and write every turn with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    given = parser.parse_args()
    trees: list[Path | None] = given.trees or [None]
    rows = list(measure_trees(trees, given.turns))
    for line in summarize(rows, [str(tree or "installed") for tree in trees]):
        print(line)
    if given.out:
        with given.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
