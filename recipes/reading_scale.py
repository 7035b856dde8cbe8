"""Time the commands that read a run directory, against the number of its checkpoints.

    python recipes/reading_scale.py OUT [--sizes 100,1000,10000] [--turns 3]

A short micro run is trained, then cloned: a run of N checkpoints has N steps on ten branches, each forked from the
end of the last, with 16 lines of rollouts and an evaluation per step. Lines are the recorded ones with other steps;
files of checkpoints are hard links. Wall clock and CPU time are those of whole processes, medians over the turns; the
start-up is `npo --help`.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npo_cli.storage.costs import costs_path
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, create_run, open_run
from npo_cli.storage.lineage import append_segment
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Segment

SEED_STEPS, NUM_BRANCHES = 20, 10
SEED_SETTINGS = (f"train.num_steps={SEED_STEPS}", "train.prompts_per_step=16", "train.save_every=1", "eval.every=1")
NPO = (sys.executable, "-m", "npo_cli")
COMMANDS = {
    "start-up": ("--help",),
    "index": ("index", "{run}"),
    "costs": ("show", "{run}", "costs"),
    "metrics": ("show", "{run}", "metrics"),
    "rollouts": ("show", "{run}", "rollouts"),
    "report": ("report", "{run}", "--out", "{run}.html"),
}
LOGS = ("metrics.jsonl", "timings.jsonl")


def clone_run(seed: RunDir, root: Path, num_checkpoints: int) -> None:
    """A run of that many checkpoints with what the steps of the seed run recorded, over and over."""
    run = create_run(root, recipe=seed.read_recipe(), npo_version=seed.info.npo_version)
    recorded = {name: list(JsonlLog(seed.branch_folder("main") / name).iter_rows()) for name in LOGS}
    lines = seed.rollouts_path("main").read_text(encoding="ascii").splitlines(keepends=True)
    # The step is the first field of a line.
    groups = [{"step": json.loads(line)["step"], "rest": line.partition(",")[2]} for line in lines]
    costs, evals = list(JsonlLog(costs_path(seed)).iter_rows()), list(JsonlLog(seed.evals_path).iter_rows())
    per_branch = num_checkpoints // NUM_BRANCHES
    for number in range(NUM_BRANCHES):
        branch, first = f"branch-{number}", number * per_branch
        run.save_recipe(branch, seed.read_recipe())
        parent = f"branch-{number - 1}" if number else None
        append_segment(run, Segment(branch=branch, parent=parent, fork_step=first, guide_cache=None, guide_until=None))
        if parent:
            JsonlLog(costs_path(run)).append({"kind": "fork", "branch": branch, "step": first})
        steps = range(first + 1, first + per_branch + 1)
        for name, rows in recorded.items():
            JsonlLog(run.branch_folder(branch) / name).extend(list(_repeat(rows, steps, branch)))
        with run.rollouts_path(branch).open("w", encoding="ascii") as file:
            file.writelines(f'{{"step":{row["step"]},{row["rest"]}' for row in _repeat(groups, steps, branch))
        JsonlLog(costs_path(run)).extend(list(_repeat(costs, steps, branch)))
        JsonlLog(run.evals_path).extend(list(_repeat(evals, steps, branch)))
        for step in steps:
            link_checkpoint(seed, run, branch, step)
    for path in run.list_logs():
        rewrite_head(path)
    assert len(RolloutLog(run.rollouts_path("branch-0")).steps()) == per_branch


def _repeat(rows: Sequence[Mapping[str, Any]], steps: Sequence[int], branch: str) -> list[dict[str, Any]]:
    """Rows of the recorded steps, as if they were of these."""
    by_step = {step: list(some) for step, some in itertools.groupby(rows, key=lambda row: row["step"])}
    named = {"branch": branch} if "branch" in rows[0] else {}
    return [row | {"step": step} | named for step in steps for row in by_step[_seed_step(step)]]


def _seed_step(step: int) -> int:
    return (step - 1) % SEED_STEPS + 1


def link_checkpoint(seed: RunDir, run: RunDir, branch: str, step: int) -> None:
    """The checkpoint of a recorded step under another step, its training state included."""
    source, target = seed.checkpoint_folder("main", _seed_step(step)), run.checkpoint_folder(branch, step)
    shutil.copytree(source, target, copy_function=os.link)
    manifest = json.loads((target / "npo.json").read_bytes()) | {"branch": branch, "step": step, "logs": {}}
    del manifest["checksum"]
    (target / "npo.json").unlink()
    (target / "npo.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="ascii")


def time_commands(root: Path, turns: int) -> Iterator[dict[str, str | float]]:
    """Median wall clock and CPU time of each command, the commands in turn (A B A B ...)."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for name in list(COMMANDS) * turns:
        command = [*NPO, *(part.format(run=root) for part in COMMANDS[name])]
        before, began = os.times(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        elapsed, after = time.perf_counter() - began, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        seconds[name].append((elapsed, cpu))
    for name, some in seconds.items():
        elapsed, cpu = (statistics.median(turn) for turn in zip(*some, strict=True))
        yield {"command": name, "seconds": round(elapsed, 2), "cpu_seconds": round(cpu, 2)}


def main() -> None:
    """Build the runs that are not there yet, time, print a table and write reading-scale.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default="100,1000,10000", help="numbers of checkpoints, multiples of 10")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    seed = given.out / "seed"
    if not seed.exists():
        subprocess.run([*NPO, "train", "micro", str(seed), *SEED_SETTINGS], check=True, stdout=subprocess.DEVNULL)
    rows = []
    for size in map(int, given.sizes.split(",")):
        root = given.out / f"run-{size}"
        if not root.exists():
            clone_run(open_run(seed), root, size)
        for found in time_commands(root, given.turns):
            rows.append({"checkpoints": size, "rollout_lines": 16 * size, **found})
            print(*(f"{value:>12}" for value in rows[-1].values()), flush=True)
    with (given.out / "reading-scale.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
