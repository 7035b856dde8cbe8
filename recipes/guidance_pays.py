"""When does guidance pay? The experiment of docs/results/guidance-pays.md: screening, tuning, confirmation, tables.

    python recipes/guidance_pays.py screen OUT                     # (a) 12 cells, every arm, 2 seeds
    python recipes/guidance_pays.py tune OUT --cells addh2         # (b) GRPO over 12 settings on tuning seeds
    python recipes/guidance_pays.py confirm OUT --cells addh2 --seeds 6
    python recipes/guidance_pays.py tune OUT --cells smollm2-stalls,smollm2-learns     # (c) a pretrained model
    python recipes/guidance_pays.py confirm OUT --cells smollm2-stalls,smollm2-learns --seeds 4
    python recipes/guidance_pays.py tables OUT                     # the tables again
    python recipes/guidance_pays.py screen OUT --dry-run           # the commands only

Each part runs `npo bench` per cell, which resumes where it stopped; the commands are printed first. What is finished is
kept in OUT as `seeds.csv`, `hysteresis.csv` and `tuning.csv`; seeds and cells that stand there are not run again, so
the experiment goes on elsewhere from these three files. `effects.csv` follows from `seeds.csv`.
"""

import argparse
import csv
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from scipy import stats

from npo_cli.cli.bench import parse_grid
from npo_cli.experiments.bench import compute_curve_areas
from npo_cli.experiments.bench_plan import BenchRun
from npo_cli.experiments.compare import collect_threshold_costs, compare_hysteresis
from npo_cli.experiments.load_methods import MethodRuns, SeedRun, load_methods
from npo_cli.experiments.method_curves import find_comparison_range
from npo_cli.storage.bench_dir import DONE_FILE, save_bench_index

Row = TypeVar("Row")
SPARSE = ("guide.replay.at_step=0", "guide.replay.guide_step=60")
PLATEAU = ("guide.replay.at_step=40", "guide.replay.guide_step=100")
MICRO_CELLS: dict[str, tuple[str, ...]] = {
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
BASELINE, PRIMARY, MISTAKES = "grpo", "distill-scout", "mistakes-first"
ARMS = ("npo-late", "distill", "distill-scout", "mistakes-first", "token-weight", "rejoin")
CONFIRMED_CELLS = ("mix50-updates4", "addh1", "addh2")
"""Of the first experiment; the family of Holm's adjustment."""
CLAIMS = {"confirm": (PRIMARY, 0), "mistakes": (MISTAKES, 1)}
"""Arm and number of the target of each experiment's primary outcome."""
FRESH_SEEDS = {"mix50-updates4": range(500, 512), "addh1": range(500, 512), "addh2": range(506, 518)}
"""Of the experiment on mistakes first: without the six of addh2 that suggested it."""
SCREENING_SEEDS, FIRST_SEED = (300, 301), 500
PROBLEMS = Path(__file__).with_name("arithmetic.py")
SCOUT_METHOD = """\
method:
  name: distill-scout
  commands:
    - train {recipe} {run} --method {method} --until 0
    - scout {run} --at 0 --name scout
    - resume {run} --at 0 --no-guide --new-branch dense target.kind=distribution
      target.teacher=scout:scout target.num_steps=6 target.group_size=2
scout:
  num_steps: 10
  num_updates: 2
"""
"""`distill-scout` for runs of 28 steps instead of 200."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One task, and how long and with what it is trained."""

    settings: tuple[str, ...]
    """On top of the recipe."""
    recipe: str = "micro"
    targets: tuple[float, ...] = (0.9, 0.8, 0.75)
    """Held-out accuracies: the primary outcome's, the secondary one's, and that of a task whose ceiling is below."""
    levels: tuple[float, ...] = (0.2, 0.4, 0.6)
    """Accuracies from which hysteresis is measured, to the secondary target."""
    grid: tuple[str, ...] = (
        "train.lr=1.5e-4,3e-4,6e-4",
        "train.num_updates=1,2 train.prompts_per_step=32 train.group_size=16",
    )
    """Of the tuning."""
    arms: tuple[str, ...] = ("npo-late", "distill", "distill-scout", "mistakes-first")
    """Of the confirmation."""
    tuning_seeds: tuple[int, ...] = (400, 401)
    method_files: Mapping[str, str] = field(default_factory=dict)
    """Arms that are not the shipped methods of these names."""


def make_micro_cell(settings: tuple[str, ...]) -> Cell:
    """A cell of the first two experiments."""
    return Cell(settings=(*settings, "eval.every=10", "train.save_every=20", "model.threads=1"))


def make_pretrained_cell(num_train: Mapping[str, int], targets: tuple[float, ...], levels: tuple[float, ...]) -> Cell:
    """A cell of the third: SmolLM2-135M-Instruct, problems drawn with the seed."""
    return Cell(
        recipe="smollm2-arithmetic",
        settings=(
            *("task.source=custom", f"task.function={PROBLEMS}:draw_task", "task.id_column=id"),
            *(f"task.function_args={json.dumps({'num_train': num_train})}", "train.num_steps=28"),
            *("eval.every=4", "train.save_every=8", "model.threads=1"),
        ),
        targets=targets,
        levels=levels,
        grid=("train.lr=1e-5,2e-5", "train.num_updates=1,2"),
        arms=("distill-scout", "mistakes-first"),
        tuning_seeds=(400,),
        method_files={"distill-scout": SCOUT_METHOD},
    )


CELLS = {name: make_micro_cell(settings) for name, settings in MICRO_CELLS.items()} | {
    "smollm2-stalls": make_pretrained_cell({"+": 60, "*": 60, "-": 60, "mod": 60}, (0.4, 0.45, 0.5), (0.2, 0.3, 0.4)),
    "smollm2-learns": make_pretrained_cell({"+": 180, "*": 60}, (0.8, 0.7, 0.9), (0.3, 0.4, 0.5)),
}
NUM_ATTEMPTS, FAILED = 2, 1
"""Of the bench of a cell; exit code of one with a failed run."""
NUM_LAST = 3
"""Evaluations that an accuracy at some cost is the mean of."""


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
    """To the target."""
    final_accuracy: float | None
    """Mean of the last three evaluations; None: the run failed."""
    gain_at_equal_tokens: float | None
    """Accuracy minus GRPO's of the same seed, each the mean of the last three evaluations within the smaller of the two
    totals of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HysteresisRow:
    """H of one seed: steps from an accuracy to the secondary target, unguided run minus replayed branch."""

    part: str
    cell: str
    arm: str
    seed: int
    accuracy: float
    target: float
    steps: float
    bound: str
    """`at least`: the unguided run never reached the target; `at most`: the replay never did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningRow:
    """One setting of GRPO in one cell."""

    cell: str
    setting: str
    area: float
    """Held-out accuracy averaged over the tokens that all settings cover, mean over the tuning seeds."""
    is_chosen: int


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
    p_holm: float | None
    """Of a claim: adjusted over the three cells; a cell that has not been run counts as 1."""
    gain: float | None
    """Mean of `gain_at_equal_tokens`, without failed runs."""
    gain_low: float | None
    gain_high: float | None
    gain_p_value: float | None


def run_part(given: argparse.Namespace) -> None:
    """Every cell in turn, without the seeds on record; its rows are written when it is finished."""
    for cell in given.cells:
        arms = tuple(given.arms or {"screen": ARMS, "tune": (), "confirm": CELLS[cell].arms}[given.part])
        if given.part == "tune":
            if read_tuned_setting(given.out, cell) is not None:
                print(f"{cell} is tuned")
                continue
            seeds: Sequence[int] = (FIRST_SEED - 1,)
        else:
            wanted = SCREENING_SEEDS if given.part == "screen" else range(FIRST_SEED, FIRST_SEED + given.seeds)
            finished = find_finished_seeds(given.out, given.part, cell, (BASELINE, *arms))
            seeds = [seed for seed in wanted if seed not in finished]
            if not seeds:
                print(f"{cell} is finished")
                continue
        command = build_command(given, cell, arms, seeds)
        print(f"$ npo {shlex.join(command)}", flush=True)
        if not given.dry_run:
            bench = [sys.executable, "-m", "npo_cli", *command, "--quiet"]
            for _ in range(NUM_ATTEMPTS):
                if (code := subprocess.run(bench, check=False).returncode) != FAILED:
                    break
            if code not in (0, FAILED):
                raise SystemExit(code)
            record_cell(given, cell, arms, seeds)
            write_effects(given.out)


def build_command(given: argparse.Namespace, cell: str, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The `npo bench` of one cell."""
    settings = list_settings(given, cell)
    if given.part == "confirm":
        tuned = read_tuned_setting(given.out, cell)
        if tuned is None:
            raise SystemExit(f"{cell} is not tuned: run the part `tune` with --cells {cell} first")
        settings = (*settings, *tuned.split())
    folder = given.out / given.part / cell
    methods = [name_method(cell, arm, folder) for arm in (BASELINE, *arms)]
    command = ["bench", CELLS[cell].recipe, *settings, "--methods", ",".join(methods), "--out", str(folder)]
    if CELLS[cell].recipe != "micro":
        command.append("--allow-code")
    command += ["--seeds", "".join(f"{seed}," for seed in seeds), "--jobs", str(given.jobs)]
    if given.part == "tune":
        for alternatives in CELLS[cell].grid:
            command += ["--grid", alternatives]
        command += ["--tuning-seeds", ",".join(map(str, CELLS[cell].tuning_seeds))]
    return command


def name_method(cell: str, arm: str, folder: Path) -> str:
    """The name of a shipped method, or a file with the cell's own variant."""
    if arm not in CELLS[cell].method_files:
        return arm
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"matched-{arm}.yaml"
    file.write_text(CELLS[cell].method_files[arm], encoding="utf-8")
    return str(file)


def list_settings(given: argparse.Namespace, cell: str) -> tuple[str, ...]:
    """KEY=VALUE of every run of a cell."""
    return (*CELLS[cell].settings, *given.overrides)


# The record: what is finished


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    adapter = TypeAdapter(row_type)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [adapter.validate_python({name: text or None for name, text in line.items()}) for line in lines]


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """A CSV file of dataclasses of one type."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    print(f"{path}: {len(rows)} rows")


def add_rows(path: Path, row_type: type[Row], new: Sequence[Row], *, key: Callable[[Row], Hashable]) -> None:
    """Add rows to a CSV file, in place of those with the same key."""
    rows = {key(row): row for row in (*read_rows(path, row_type), *new)}
    if rows:
        write_rows(path, list(rows.values()))


def find_finished_seeds(out: Path, part: str, cell: str, arms: Sequence[str]) -> set[int]:
    """Seeds of which every arm is on record."""
    rows = [row for row in read_rows(out / "seeds.csv", SeedRow) if (row.part, row.cell) == (part, cell)]
    seeds = [{row.seed for row in rows if row.arm == f"matched-{arm}"} for arm in arms]
    return set.intersection(*seeds)


def read_tuned_setting(out: Path, cell: str) -> str | None:
    """KEY=VALUE that the tuning seeds chose for GRPO; None before."""
    rows = read_rows(out / "tuning.csv", TuningRow)
    return next((row.setting for row in rows if row.cell == cell and row.is_chosen), None)


def record_cell(given: argparse.Namespace, cell: str, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Add the bench of a cell to the CSV files; a run that failed is censored at GRPO's total."""
    folder = given.out / given.part / cell
    if given.part == "tune":
        tuning = measure_settings(folder, list_settings(given, cell), cell)
        add_rows(given.out / "tuning.csv", TuningRow, tuning, key=lambda row: (row.cell, row.setting))
        return
    names = [f"matched-{arm}" for arm in (BASELINE, *arms)]
    runs = [(name, file) for name in names for file in folder.glob(f"runs/{name}/*/seed-*/{DONE_FILE}")]
    finished = [(name, file.parent / "run") for name, file in runs if int(file.parent.name[len("seed-") :]) in seeds]
    save_bench_index(folder, finished)
    methods = load_methods([str(folder)], baseline=None)
    rows = [
        row
        for target in CELLS[cell].targets
        for method in methods
        for row in list_seed_rows(given.part, cell, method, methods, target)
    ]
    known = {(row.arm, row.seed) for row in rows}
    rows += [
        replace(row, arm=name, tokens=None, seconds=None, final_accuracy=None, gain_at_equal_tokens=None)
        for row in rows
        if row.arm == names[0]
        for name in names
        if (name, row.seed) not in known
    ]
    add_rows(
        given.out / "seeds.csv", SeedRow, rows, key=lambda row: (row.part, row.cell, row.arm, row.seed, row.target)
    )
    add_rows(
        given.out / "hysteresis.csv",
        HysteresisRow,
        list(list_hysteresis_rows(given.part, cell, methods)),
        key=lambda row: (row.part, row.cell, row.arm, row.seed, row.accuracy),
    )


def record_again(given: argparse.Namespace) -> None:
    """The rows of every cell on record whose runs are still there."""
    known: dict[tuple[str, str], list[SeedRow]] = {}
    for row in read_rows(given.out / "seeds.csv", SeedRow):
        known.setdefault((row.part, row.cell), []).append(row)
    for (part, cell), rows in known.items():
        if (given.out / part / cell / "runs").is_dir():
            arms = dict.fromkeys(row.arm.removeprefix("matched-") for row in rows)
            again = argparse.Namespace(**(vars(given) | {"part": part}))
            record_cell(again, cell, [arm for arm in arms if arm != BASELINE], sorted({row.seed for row in rows}))


def measure_settings(folder: Path, settings: tuple[str, ...], cell: str) -> list[TuningRow]:
    """The area of every setting, as the bench chose by."""
    grid = parse_grid(CELLS[cell].grid)
    runs = [
        [
            BenchRun(
                recipe=CELLS[cell].recipe,
                method=BASELINE,
                settings=(*settings, *setting.split()),
                seed=seed,
                folder=folder / "tuning" / f"matched-{BASELINE}" / setting.replace(" ", "+") / f"seed-{seed}",
                teacher="",
            )
            for setting in grid
        ]
        for seed in CELLS[cell].tuning_seeds
    ]
    areas = [statistics.fmean(each) for each in zip(*map(compute_curve_areas, runs), strict=True)]
    return [
        TuningRow(cell=cell, setting=setting, area=area, is_chosen=int(area == max(areas)))
        for setting, area in zip(grid, areas, strict=True)
    ]


def list_seed_rows(
    part: str, cell: str, method: MethodRuns, methods: Sequence[MethodRuns], target: float
) -> Iterator[SeedRow]:
    """What each seed of an arm paid until any policy that it had paid for reached the target."""
    ways = collect_threshold_costs(target, method, find_comparison_range(methods), curve="best held")
    baseline = {one.run_branch.seed: one for one in methods[0].runs}
    for one, tokens, seconds in zip(method.runs, ways["tokens"], ways["seconds"], strict=True):
        theirs = baseline[tokens.seed]
        budget = min(run.points[-1].tokens for run in (one, theirs))
        yield SeedRow(
            part=part,
            cell=cell,
            arm=method.name,
            seed=tokens.seed,
            target=target,
            tokens=tokens.cost,
            total_tokens=tokens.total_cost,
            seconds=seconds.cost,
            final_accuracy=average_last(one),
            gain_at_equal_tokens=average_last(one, budget=budget) - average_last(theirs, budget=budget),
        )


def average_last(one: SeedRun, *, budget: float = math.inf) -> float:
    """Mean accuracy of the last evaluations within a budget of tokens."""
    within = [point.accuracy for point in one.points if point.tokens <= budget]
    return statistics.fmean(within[-NUM_LAST:])


def list_hysteresis_rows(part: str, cell: str, methods: Sequence[MethodRuns]) -> Iterator[HysteresisRow]:
    """H of each seed of every arm with a guided replay."""
    for seed in methods[0].seeds:
        own = [
            replace(method, runs=tuple(one for one in method.runs if one.run_branch.seed == seed))
            for method in methods
            if seed in method.seeds
        ]
        for found in compare_hysteresis(own, (*CELLS[cell].levels, CELLS[cell].targets[1])):
            yield HysteresisRow(
                part=part,
                cell=cell,
                arm=found.method,
                seed=seed,
                accuracy=found.accuracy,
                target=found.target,
                steps=found.steps.value,
                bound=found.bound,
            )


# What follows from it


def write_effects(out: Path) -> None:
    """`effects.csv`, from `seeds.csv`."""
    rows: dict[tuple[str, str, float], dict[str, list[SeedRow]]] = {}
    seeds = read_rows(out / "seeds.csv", SeedRow)
    for row in (*seeds, *list_fresh_rows(seeds)):
        rows.setdefault((row.part, row.cell, row.target), {}).setdefault(row.arm, []).append(row)
    effects = [
        estimate_effect(found, arms[f"matched-{BASELINE}"])
        for arms in rows.values()
        for name, found in arms.items()
        if name != f"matched-{BASELINE}"
    ]
    for part, (arm, target) in CLAIMS.items():
        claims = [
            row
            for row in effects
            if (row.part, row.arm) == (part, f"matched-{arm}")
            and row.cell in CONFIRMED_CELLS
            and row.target == CELLS[row.cell].targets[target]
        ]
        p_values = [1.0 if row.p_value is None else row.p_value for row in claims]
        for row, p in zip(claims, adjust_holm(p_values, family=len(CONFIRMED_CELLS)), strict=True):
            effects[effects.index(row)] = replace(row, p_holm=p)
    if effects:
        write_rows(out / "effects.csv", effects)


def list_fresh_rows(rows: Sequence[SeedRow]) -> list[SeedRow]:
    """The rows of the confirmation that the experiment on mistakes first is about, as its own part."""
    arms = (f"matched-{BASELINE}", f"matched-{MISTAKES}")
    return [
        replace(row, part="mistakes")
        for row in rows
        if row.part == "confirm" and row.arm in arms and row.seed in FRESH_SEEDS.get(row.cell, ())
    ]


def adjust_holm(p_values: Sequence[float], *, family: int) -> list[float]:
    """Holm's step-down adjustment (1979): the i-th smallest of m, times m - i + 1, at least its predecessor's, at most
    1. m = `family`; tests of it that are missing count as 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (family - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def estimate_effect(arm: Sequence[SeedRow], baseline: Sequence[SeedRow]) -> EffectRow:
    """The primary outcome: the log ratio of tokens, censored at the smallest total h of any run of the pair of arms."""
    theirs = {row.seed: row for row in baseline}
    arm = [row for row in arm if row.seed in theirs]
    paired = [theirs[row.seed] for row in arm]
    horizon = min(row.total_tokens for row in (*arm, *paired))
    logs = [
        math.log(min(one.tokens or horizon, horizon) / min(row.tokens or horizon, horizon))
        for row, one in zip(arm, paired, strict=True)
    ]
    mean, low, high, p_value = estimate_mean(logs)
    gains = [row.gain_at_equal_tokens for row in arm if row.gain_at_equal_tokens is not None]
    gain, gain_low, gain_high, gain_p_value = estimate_mean(gains) if gains else (None,) * 4
    first = arm[0]
    return EffectRow(
        part=first.part,
        cell=first.cell,
        arm=first.arm,
        target=first.target,
        num_seeds=len(arm),
        num_reached=sum(row.tokens is not None for row in arm),
        num_reached_baseline=sum(row.tokens is not None for row in paired),
        ratio=math.exp(mean),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        p_value=p_value,
        p_holm=None,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        gain_p_value=gain_p_value,
    )


def estimate_mean(values: Sequence[float]) -> tuple[float, float | None, float | None, float | None]:
    """Mean, Student's 95 % interval and the p value of a mean of 0; None of one value, or of equal ones."""
    mean = statistics.fmean(values)
    if len(set(values)) < 2:
        return mean, None, None, None
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high), float(test.pvalue)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["screen", "tune", "confirm", "tables"])
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument("--cells", type=lambda text: text.split(","), default=list(MICRO_CELLS), metavar="A,B")
    parser.add_argument("--arms", type=lambda text: text.split(","), metavar="A,B")
    parser.add_argument("--seeds", type=int, default=12, help="of the confirmation")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_intermixed_args()
    unknown = set(given.cells) - set(CELLS)
    if unknown:
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    if given.part == "tables":
        record_again(given)
        write_effects(given.out)
    else:
        run_part(given)


if __name__ == "__main__":
    main()
