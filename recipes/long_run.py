"""Train a tiny run for thousands of steps, and say what grew: time per step, memory, and every file that is not a log.

    python recipes/long_run.py OUT [--steps 5000] [--marks 50,500,5000] [KEY=VALUE...]

`npo train` runs in a process of its own in OUT/run and is watched from outside. At each mark: the median time of the
last 50 steps (timings.jsonl), the last save's (costs.jsonl), resident memory (/proc), bytes of the newest checkpoint's
state and manifests, of all documents of the run directory, and of its logs, which may only grow by whole steps. Writes
OUT/long_run.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TINY = (
    *("train.prompts_per_step=4", "train.group_size=4", "task.pool_size=64", "task.heldout_size=8"),
    *("train.save_every=50", "train.keep_full_checkpoints=2", "train.keep_weights_only=2", "eval.every=250"),
    *("sampling.max_new_tokens=6", "model.threads=1"),
)
WINDOW = 50
POLL_SECONDS = 0.02


def resident_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a log."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def look(run: Path, pid: int, step: int) -> dict[str, float]:
    """What a run of `step` steps takes now."""
    branch = run / "branches/main"
    memory = resident_mb(pid)
    seconds = [row["seconds"] for row in read_rows(branch / "timings.jsonl") if row["step"] <= step]
    saves = [row["seconds"] for row in read_rows(run / "costs.jsonl") if row["kind"] == "save"]
    newest = sorted((branch / "checkpoints").glob("step_*"))[-1]
    files = [path for path in run.rglob("*") if path.is_file()]
    logs = [path for path in files if path.suffix in (".jsonl", ".txt")]
    return {
        "step": step,
        "seconds per step": statistics.median(seconds[-WINDOW:]),
        "seconds per save": statistics.median(saves[-4:]),
        "resident MB": memory,
        "state.json": (newest / "training_state/state.json").stat().st_size,
        "optimizer.safetensors": (newest / "training_state/optimizer.safetensors").stat().st_size,
        "manifests": sum(path.stat().st_size for path in newest.rglob("npo*.json")),
        "documents": sum(path.stat().st_size for path in files if path not in logs),
        "log bytes per step": sum(path.stat().st_size for path in logs) / step,
    }


def watch(run: Path, child: subprocess.Popen, marks: Sequence[int]) -> list[dict[str, float]]:
    """A row per mark that the process reaches."""
    metrics, rows, left, num_lines, position = run / "branches/main/metrics.jsonl", [], list(marks), 0, 0
    while left and child.poll() is None:
        time.sleep(POLL_SECONDS)
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(position)
                new = file.read()
            num_lines, position = num_lines + new.count(b"\n"), position + len(new)
        if num_lines >= left[0]:
            # A second later the checkpoint of that step is there.
            time.sleep(1.0)
            rows.append(look(run, child.pid, left.pop(0)))
    return rows


def main(arguments: Sequence[str]) -> None:
    """Train, watch, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--marks", default="50,500,5000")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    marks = [mark for mark in map(int, options.marks.split(",")) if mark <= options.steps]
    options.out.mkdir(parents=True, exist_ok=True)
    run = options.out / "run"
    # Some steps more: at the last mark the process is still there.
    settings = [*TINY, f"train.num_steps={options.steps + 2 * WINDOW}", *options.overrides]
    command = [sys.executable, "-m", "npo_cli", "train", "micro", str(run), *settings, "--quiet"]
    with (options.out / "output.txt").open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            rows = watch(run, child, marks)
        finally:
            child.terminate()
            child.wait()
    if len(rows) < len(marks):
        raise SystemExit(f"the run ended early: {options.out / 'output.txt'}")
    print("| " + " | ".join(["", *(f"step {row['step']:,}" for row in rows)]) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for name in rows[0]:
        if name != "step":
            print("| " + " | ".join([name, *(f"{row[name]:,.4g}" for row in rows)]) + " |")
    (options.out / "long_run.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
