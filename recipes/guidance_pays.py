"""When does guidance pay? The experiment of docs/results/guidance-pays.md: screening, tuning, confirmation, tables.

    python recipes/guidance_pays.py screen OUT                     # (a) 12 cells, every arm, 2 seeds
    python recipes/guidance_pays.py tune OUT --cells addh2         # (b) GRPO over 12 settings on tuning seeds
    python recipes/guidance_pays.py confirm OUT --cells addh2 --seeds 6
    python recipes/guidance_pays.py tables OUT                     # CSV files from whatever is finished
    python recipes/guidance_pays.py screen OUT --dry-run           # the commands only

Each part runs `npo bench` per cell, which resumes where it stopped; the commands are printed first. `tables` reads run
directories and trains nothing.
"""

import argparse
import csv
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy import stats

from npo_cli.experiments.compare import collect_threshold_costs, compare_hysteresis
from npo_cli.experiments.load_methods import MethodRuns, load_methods
from npo_cli.experiments.method_curves import find_comparison_range
from npo_cli.storage.bench_dir import is_bench

SPARSE = ("guide.replay.at_step=0", "guide.replay.guide_step=60")
PLATEAU = ("guide.replay.at_step=40", "guide.replay.guide_step=100")
CELLS: dict[str, tuple[str, ...]] = {
    "addh1": ("task.kind=addh1", "train.num_steps=160", *SPARSE),
    "addh2": ("task.kind=addh2", "train.num_steps=200", *SPARSE),
    "addh4": ("task.kind=addh4", "train.num_steps=240", *SPARSE),
    "mix50": ("train.num_steps=240", *PLATEAU),
    "mix80": ("task.hard_share=0.8", "train.num_steps=240", *PLATEAU),
    "mix95": ("task.hard_share=0.95", "train.num_steps=240", *PLATEAU),
    "pool64": ("task.pool_size=64", "train.num_steps=240", *PLATEAU),
    "pool128": ("task.pool_size=128", "train.num_steps=240", *PLATEAU),
    "mix50-updates4": ("train.num_updates=4", "train.num_steps=240", *PLATEAU),
    "mix50-lr6e-4": ("train.lr=6e-4", "train.num_steps=240", *PLATEAU),
    "addh2-updates4": ("task.kind=addh2", "train.num_updates=4", "train.num_steps=200", *SPARSE),
    "addh2-lr6e-4": ("task.kind=addh2", "train.lr=6e-4", "train.num_steps=200", *SPARSE),
}
"""Settings on top of the recipe `micro`: 16 prompts x 8 rollouts, AdamW, learning rate 3e-4, one update per step."""
BASELINE = "grpo"
ARMS = ("npo-late", "distill", "distill-scout", "mistakes-first", "token-weight", "rejoin")
CONFIRMED_ARMS = ("npo-late", "distill", "distill-scout", "mistakes-first")
SCREENING_SEEDS, TUNING_SEEDS, FIRST_SEED = (300, 301), (400, 401), 500
GRID = ("train.lr=1.5e-4,3e-4,6e-4", "train.num_updates=1,2 train.prompts_per_step=32 train.group_size=16")
COMMON = ("eval.every=10", "train.save_every=20", "model.threads=1")
TARGETS = (0.9, 0.8)
"""Held-out accuracies: the primary outcome's, the secondary one's."""
LEVELS = (0.2, 0.4, 0.6)
"""Accuracies from which hysteresis is measured, to the secondary target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRow:
    """One seed of one arm in one cell."""

    part: str
    cell: str
    arm: str
    seed: int
    target: float
    tokens: float | None
    """To the target, on the best-held curve; None: it was not reached."""
    total_tokens: float
    seconds: float | None
    final_accuracy: float
    """Mean of the last three evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EffectRow:
    """One arm beside GRPO in one cell: exp of the mean of log(min(T, h) of GRPO / min(T, h) of the arm) over seeds."""

    part: str
    cell: str
    arm: str
    target: float
    num_seeds: int
    num_reached: int
    num_reached_baseline: int
    ratio: float
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided, paired t test of the log ratio."""


def build_command(
    part: str, cell: str, arms: Sequence[str], seeds: Sequence[int], given: argparse.Namespace
) -> list[str]:
    """The `npo bench` of one cell."""
    settings = [*CELLS[cell], *COMMON, *given.overrides]
    if part == "confirm":
        settings += read_tuned_setting(given.out / "tune" / cell)
    command = [
        "bench",
        "micro",
        *settings,
        "--methods",
        ",".join((BASELINE, *arms)),
        "--out",
        str(given.out / part / cell),
    ]
    command += ["--seeds", ",".join(map(str, seeds)), "--jobs", str(given.jobs)]
    for alternatives in GRID if part == "tune" else ():
        command += ["--grid", alternatives]
    return [*command, "--tuning-seeds", ",".join(map(str, TUNING_SEEDS))] if part == "tune" else command


def read_tuned_setting(folder: Path) -> list[str]:
    """KEY=VALUE that the tuning seeds chose for GRPO."""
    path = folder / "tuning.json"
    if not path.exists():
        raise SystemExit(f"{folder.name} is not tuned: run the part `tune` with --cells {folder.name} first")
    (setting,) = json.loads(path.read_text(encoding="utf-8")).values()
    return str(setting).split()


def run_part(given: argparse.Namespace) -> None:
    """Every cell in turn; its rows are written when it is finished."""
    arms, seeds = {
        "screen": (ARMS, SCREENING_SEEDS),
        "tune": ((), (FIRST_SEED - 1,)),
        "confirm": (CONFIRMED_ARMS, range(FIRST_SEED, FIRST_SEED + given.seeds)),
    }[given.part]
    for cell in given.cells:
        command = build_command(given.part, cell, given.arms or arms, seeds, given)
        print(f"$ npo {shlex.join(command)}", flush=True)
        if not given.dry_run:
            subprocess.run([sys.executable, "-m", "npo_cli", *command, "--quiet"], check=True)
            write_tables(given.out)


def write_tables(out: Path) -> None:
    """`seeds.csv`, `effects.csv` and `hysteresis.csv` of all finished cells."""
    seeds: list[SeedRow] = []
    effects: list[EffectRow] = []
    hysteresis: list[Mapping[str, object]] = []
    for part in ("screen", "confirm"):
        for cell in CELLS:
            folder = out / part / cell
            if not (folder.is_dir() and is_bench(folder)):
                continue
            methods = load_methods([str(folder)], baseline=None)
            for target in TARGETS:
                rows = {method.name: list(list_seed_rows(part, cell, method, methods, target)) for method in methods}
                seeds += [row for found in rows.values() for row in found]
                effects += [
                    estimate_effect(found, rows[methods[0].name])
                    for name, found in rows.items()
                    if name != methods[0].name
                ]
            hysteresis += [
                {
                    "part": part,
                    "cell": cell,
                    "arm": one.method,
                    "accuracy": one.accuracy,
                    "target": one.target,
                    "steps": one.steps.value,
                    "bound": one.bound,
                    "num_seeds": one.steps.num_used,
                }
                for one in compare_hysteresis(methods, (*LEVELS, TARGETS[1]))
            ]
    for name, rows in (
        ("seeds", list(map(asdict, seeds))),
        ("effects", list(map(asdict, effects))),
        ("hysteresis", hysteresis),
    ):
        if rows:
            with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            print(f"{out / name}.csv: {len(rows)} rows")


def list_seed_rows(
    part: str, cell: str, method: MethodRuns, methods: Sequence[MethodRuns], target: float
) -> Iterator[SeedRow]:
    """What each seed of an arm paid until any policy that it had paid for reached the target."""
    ways = collect_threshold_costs(target, method, find_comparison_range(methods), curve="best held")
    for one, way in zip(method.runs, ways["tokens"], strict=True):
        last = one.points[-1]
        yield SeedRow(
            part=part,
            cell=cell,
            arm=method.name,
            seed=way.seed,
            target=target,
            tokens=way.cost,
            total_tokens=way.total_cost,
            seconds=last.seconds,
            final_accuracy=statistics.fmean(point.accuracy for point in one.points[-3:]),
        )


def estimate_effect(arm: Sequence[SeedRow], baseline: Sequence[SeedRow]) -> EffectRow:
    """The primary outcome: the log ratio of tokens, censored at the smallest total h of any run of the pair of arms."""
    horizon = min(row.total_tokens for row in (*arm, *baseline))
    theirs = {row.seed: row for row in baseline}
    logs = [
        math.log(min(theirs[row.seed].tokens or horizon, horizon) / min(row.tokens or horizon, horizon))
        for row in arm
        if row.seed in theirs
    ]
    mean = statistics.fmean(logs)
    low = high = p_value = None
    if len(logs) > 1 and any(logs):
        test = stats.ttest_1samp(logs, 0.0)
        interval = test.confidence_interval(0.95)
        low, high, p_value = math.exp(interval.low), math.exp(interval.high), float(test.pvalue)
    first = arm[0]
    return EffectRow(
        part=first.part,
        cell=first.cell,
        arm=first.arm,
        target=first.target,
        num_seeds=len(logs),
        num_reached=sum(row.tokens is not None for row in arm),
        num_reached_baseline=sum(row.tokens is not None for row in baseline),
        ratio=math.exp(mean),
        low=low,
        high=high,
        p_value=p_value,
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["screen", "tune", "confirm", "tables"])
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument("--cells", type=lambda text: text.split(","), default=list(CELLS), metavar="A,B")
    parser.add_argument("--arms", type=lambda text: tuple(text.split(",")), metavar="A,B")
    parser.add_argument("--seeds", type=int, default=12, help="of the confirmation")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_intermixed_args()
    unknown = set(given.cells) - set(CELLS)
    if unknown:
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    if given.part == "tables":
        write_tables(given.out)
    else:
        run_part(given)


if __name__ == "__main__":
    main()
