"""Time asynchronous sampling: the learner's idle share and steps per second with train.staleness 0 and 1.

    python recipes/bench_staleness.py micro                            # 16 x 8 rollouts of at most 18 tokens
    python recipes/bench_staleness.py smollm2-135m train.prompts_per_step=4 --steps 20
    python recipes/bench_staleness.py micro --steps 6 --rounds 1       # a check that it runs

Synchronous training with one and with two threads, and staleness 1 with one thread for the learner and one for the
producer, each in a process of its own, in turn (A B C A B C ...), so that a machine that slows down slows all. Steps of
the start (`--warmup`) are left out. *idle*: share of a step in which the learner waits for rollouts, or in synchronous
training samples. Nothing else may run: two processes need two free cores.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from npo_cli.storage.layout import open_run
from npo_cli.storage.metrics import read_timings

ONE = ("train.staleness=0", "model.threads=1")
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "staleness 0, one thread": (1, ONE),
    "staleness 0, two threads": (2, ("train.staleness=0", "model.threads=2")),
    "staleness 1, one thread each": (1, ("train.staleness=1", "model.threads=1", "engine.producer.threads=1")),
}
"""Threads of each process, and settings."""
BASELINE = "staleness 0, one thread"


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One run of one case; means over its steps after the warmup."""

    case: str
    round: int
    seconds_per_step: float
    wait_seconds: float
    sampling_seconds: float
    update_seconds: float

    @property
    def idle(self) -> float:
        """Share of a step in which the learner does not learn."""
        return self.wait_seconds / self.seconds_per_step


def measure_case(case: str, number: int, given: argparse.Namespace) -> Timing:
    """Train in a process of its own, and read its timings."""
    threads, settings = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        length = (f"train.num_steps={given.steps}", f"train.save_every={given.steps}", "eval.every=0")
        command = [sys.executable, "-m", "npo_cli", "train", given.recipe, str(root), "--quiet"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        subprocess.run([*command, *length, *settings, *given.settings], check=True, env=environment)
        steps = [row for row in read_timings(open_run(root), "main") if row["step"] > given.warmup]
    waits = [row["seconds/rollouts"] for row in steps]
    return Timing(
        case=case,
        round=number,
        seconds_per_step=statistics.fmean(row["seconds"] for row in steps),
        wait_seconds=statistics.fmean(waits),
        sampling_seconds=statistics.fmean(row.get("seconds/sampling", row["seconds/rollouts"]) for row in steps),
        update_seconds=statistics.fmean(row["seconds/update"] for row in steps),
    )


def measure_rounds(given: argparse.Namespace) -> Iterator[Timing]:
    """Every case once per round."""
    for number in range(given.rounds):
        for case in CASES:
            yield measure_case(case, number, given)


def print_table(timings: Sequence[Timing]) -> None:
    """Medians over rounds; the ratio is that of the same round, so that a slow minute cancels."""
    by_round = {(timing.case, timing.round): timing for timing in timings}
    print("| case | steps per second | x one thread | idle | sampling, s | update, s |\n|---|---|---|---|---|---|")
    for case in CASES:
        own = [timing for timing in timings if timing.case == case]
        rate = statistics.median(1 / timing.seconds_per_step for timing in own)
        ratio = statistics.median(
            by_round[BASELINE, timing.round].seconds_per_step / timing.seconds_per_step for timing in own
        )
        idle = statistics.median(timing.idle for timing in own)
        sampling = statistics.median(timing.sampling_seconds for timing in own)
        update = statistics.median(timing.update_seconds for timing in own)
        print(f"| {case} | {rate:.3f} | {ratio:.2f} | {idle:.1%} | {sampling:.3f} | {update:.3f} |")


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=3, help="steps at the start that are not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV of every run")
    given = parser.parse_args()
    if given.steps <= given.warmup:
        parser.error("--steps must be above --warmup")
    timings = list(measure_rounds(given))
    print_table(timings)
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(timings[0])))
            writer.writeheader()
            writer.writerows(map(asdict, timings))


if __name__ == "__main__":
    main()
