"""Make the tables of recipes/README.md again: GRPO against one manual intervention, seed by seed.

    python recipes/evidence.py OUT --recipe micro --lr 3e-4 --steps 220 --at 40 --guide 100 --seeds 0,1,2,3,4

Each seed is one run directory, made with the `npo` commands a person would type: train, sample-guide, resume. What
is already there is not done again. The table counts everything: by index, by optimiser steps, by generated tokens.
With --at left out only GRPO is trained, as for choosing its learning rate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NPO = [sys.executable, "-c", "from npo_cli.cli.app import main; main()"]
GRPO, GUIDED = "main", "guided"
THRESHOLDS = (0.6, 0.9)
COSTS = ("step", "total_steps", "total_tokens")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a 95 % interval of a mean of n values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One row pair of the table."""

    recipe: str
    lr: str
    steps: int
    at: int | None
    guide: int | None
    extra: tuple[str, ...]


def npo(log: Path, *arguments: str) -> None:
    """One command, its talk kept in a log; a failure stops the script."""
    with log.open("a") as sink:
        sink.write(f"$ npo {' '.join(arguments)}\n")
        sink.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*NPO, *arguments], stdout=sink, stderr=sink, env=environment, check=True)


def last_step(run: Path, arm: str) -> int | None:
    """The newest step on record; None where the arm does not exist."""
    journal = run / "branches" / arm / "metrics.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return json.loads(lines[-1])["step"] if lines else None


def one_seed(plan: Plan, seed: int, out: Path) -> Path:
    """Train, and roll back once with a guide; what is done is skipped, what was cut short goes on."""
    run = out / f"{plan.recipe}-lr{plan.lr}-seed{seed}"
    log = run.with_suffix(".log")
    if not (run / "npo_run.json").exists():
        settings = [f"train.seed={seed}", f"train.lr={plan.lr}", f"train.num_steps={plan.steps}", *plan.extra]
        npo(log, "train", plan.recipe, *settings, "--run", str(run))
    elif (last_step(run, GRPO) or 0) < plan.steps:
        npo(log, "resume", str(run), "--from", GRPO)
    if plan.at is None:
        return run
    where, cache = ["--at", str(plan.at)], run / "guides" / GUIDED / "guide.json"
    if not (cache.exists() and json.loads(cache.read_text())["complete"]):
        npo(log, "sample-guide", str(run), *where, "--guide", str(plan.guide), "--name", GUIDED, "--branch", GRPO)
    if not (run / "branches" / GUIDED).exists():
        npo(log, "resume", str(run), *where, "--guide", GUIDED)
    elif (last_step(run, GUIDED) or 0) < plan.steps:
        npo(log, "resume", str(run), "--from", GUIDED)
    return run


@cache
def records(run: Path, arm: str) -> list[dict[str, Any]]:
    """Curve points and crossings of one arm, as `npo show RUN costs --json` prints them."""
    command = [*NPO, "show", str(run), "costs", "--branch", arm, "--json"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def final_accuracy(run: Path, arm: str) -> float:
    """Mean of the last three evaluations."""
    points = [row["accuracy"] for row in records(run, arm) if row["record"] == "curve_point"]
    return statistics.fmean(points[-3:])


def crossings(runs: Sequence[Path], arm: str, threshold: float, *, axis: str) -> list[int | None]:
    """Cost of reaching the threshold, one value a seed; None where it was not reached."""
    found = []
    for run in runs:
        rows = [row for row in records(run, arm) if row["record"] == "crossing" and row["threshold"] == threshold]
        found.append(rows[0][axis])
    return found


def spread(values: Sequence[float]) -> str:
    """mean +- standard deviation."""
    return (
        f"{statistics.fmean(values):.3f} +- {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
    )


def speed_up(slow: Sequence[int | None], fast: Sequence[int | None], start: int = 0) -> str:
    """Mean over seeds of the paired ratio, 95 % t interval; seeds in which an arm never arrived are left out."""
    pairs = [(a - start, b - start) for a, b in zip(slow, fast, strict=True) if a is not None and b is not None]
    ratios = [a / b for a, b in pairs if b > 0]
    if len(ratios) < 2:
        return " ".join(f"{ratio:.2f}x" for ratio in ratios) or "-"
    half = T_95[min(8, len(ratios))] * statistics.stdev(ratios) / len(ratios) ** 0.5
    mean = statistics.fmean(ratios)
    return f"{mean:.2f}x [{mean - half:.2f}, {mean + half:.2f}] ({len(ratios)} of {len(slow)})"


def arrivals(values: Sequence[int | None]) -> str:
    """Mean over the seeds that arrived, and how many did."""
    there = [value for value in values if value is not None]
    return f"{statistics.fmean(there):,.0f} ({len(there)} of {len(values)})" if there else f"- (0 of {len(values)})"


def arm_rows(runs: Sequence[Path], arm: str) -> list[str]:
    """What one arm reached and what it cost, a line a threshold."""
    final = spread([final_accuracy(run, arm) for run in runs])
    return [
        f"| {arm} | {final} | {threshold} | "
        + " | ".join(arrivals(crossings(runs, arm, threshold, axis=axis)) for axis in COSTS)
        + " |"
        for threshold in THRESHOLDS
    ]


def ratio_rows(runs: Sequence[Path], at: int) -> list[str]:
    """GRPO's cost over the guided arm's, paired by seed; the last line counts steps from the rollback point only."""
    better = sum(final_accuracy(run, GUIDED) >= final_accuracy(run, GRPO) for run in runs)
    lines = []
    for threshold in THRESHOLDS:
        slow, fast = ([crossings(runs, arm, threshold, axis=axis) for axis in COSTS] for arm in (GRPO, GUIDED))
        ratios = [speed_up(*pair) for pair in zip(slow, fast, strict=True)]
        lines.append(f"| ratio | guided not lower on {better} of {len(runs)} | {threshold} | {' | '.join(ratios)} |")
        if at:
            lines.append(f"| ratio from step {at} | | {threshold} | {speed_up(slow[0], fast[0], start=at)} | | |")
    return lines


def table(plan: Plan, runs: Sequence[Path]) -> list[str]:
    """Markdown lines."""
    lines = ["| arm | final accuracy | threshold | index | total steps | total tokens |", "|---|---|---|---|---|---|"]
    lines += arm_rows(runs, GRPO)
    if plan.at is not None:
        lines += [*arm_rows(runs, GUIDED), *ratio_rows(runs, plan.at)]
    return lines


def main() -> None:
    """Run the seeds, side by side as `--jobs` allows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--lr", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--at", type=int)
    parser.add_argument("--guide", type=int)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    plan = Plan(
        recipe=given.recipe, lr=given.lr, steps=given.steps, at=given.at, guide=given.guide, extra=tuple(given.set)
    )
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = list(pool.map(lambda seed: one_seed(plan, seed, given.out), seeds))
    sys.stdout.write("\n".join(table(plan, runs)) + "\n")


if __name__ == "__main__":
    main()
