"""Make the tables of recipes/README.md again: GRPO against interventions by hand and against AutoNPO, seed by seed.

    python recipes/evidence.py OUT --recipe micro --lr 3e-4 --steps 220 \\
        --arm late=40:100 --arm 'auto=auto autonpo.max_interventions=2'

Each seed is one run directory, made with the `npo` commands a person would type: train, sample-guide, resume; AutoNPO
works on a copy of it (`npo resume --autonpo`), which is the same as training with it. What is already there is not done
again. The table counts everything: by index, by optimiser steps, by generated tokens, by wall clock. Without --arm only
GRPO is trained, as for choosing its learning rate.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NPO = [sys.executable, "-c", "from npo_cli.cli.main import main; main()"]
GRPO, AUTO = "main", "auto"
THRESHOLDS = (0.6, 0.9)
COSTS = ("step", "total_steps", "total_tokens", "total_seconds")
HEAD = ("arm", "final accuracy", "threshold", "index", "total steps", "total tokens", "wall clock, s")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a 95 % interval of a mean of n values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One line of descent of each seed's run."""

    name: str
    at: int | None = None
    """Step that a manual intervention goes back to; None for AutoNPO."""
    guide: int | None = None
    settings: tuple[str, ...] = ()
    """Of AutoNPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One table."""

    recipe: str
    lr: str
    steps: int
    methods: tuple[Method, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MethodRun:
    """Where an arm of one seed lies."""

    run: Path
    branch: str


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


def run_seed(plan: Experiment, seed: int, out: Path) -> dict[str, MethodRun]:
    """Train, and try every arm; what is done is skipped, what was cut short goes on."""
    run = out / f"{plan.recipe}-lr{plan.lr}-seed{seed}"
    log = run.with_suffix(".log")
    if not (run / "npo_run.json").exists():
        settings = [f"train.seed={seed}", f"train.lr={plan.lr}", f"train.num_steps={plan.steps}", *plan.extra]
        npo(log, "train", plan.recipe, *settings, "--run", str(run))
    elif (last_step(run, GRPO) or 0) < plan.steps:
        npo(log, "resume", str(run), "--from", GRPO)
    places = {GRPO: MethodRun(run, GRPO)}
    for arm in plan.methods:
        places[arm.name] = run_autonpo_method(plan, arm, run) if arm.at is None else run_manual_method(plan, arm, run)
    return places


def run_manual_method(plan: Experiment, arm: Method, run: Path) -> MethodRun:
    """One rollback with the guide of one step."""
    log = run.with_suffix(".log")
    where, cache = ["--at", str(arm.at)], run / "guides" / arm.name / "guide.json"
    if not (cache.exists() and json.loads(cache.read_text())["complete"]):
        npo(log, "sample-guide", str(run), *where, "--guide", str(arm.guide), "--name", arm.name, "--branch", GRPO)
    if not (run / "branches" / arm.name).exists():
        npo(log, "resume", str(run), *where, "--guide", arm.name, "--from", GRPO)
    elif (last_step(run, arm.name) or 0) < plan.steps:
        npo(log, "resume", str(run), "--from", arm.name)
    return MethodRun(run, arm.name)


def run_autonpo_method(plan: Experiment, arm: Method, run: Path) -> MethodRun:
    """AutoNPO on a copy, so that its probes are not charged to the plain arm."""
    log = run.with_suffix(".log")
    copy, hidden = run.with_name(f"{run.name}-{arm.name}"), run.with_name(f".{run.name}-{arm.name}")
    if not copy.exists():
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.copytree(run, hidden)
        hidden.rename(copy)
        npo(log, "resume", str(copy), "--autonpo", "--from", GRPO, *arm.settings)
    elif (last_step(copy, read_transitions(copy)[-1]["branch"]) or 0) < plan.steps:
        npo(log, "resume", str(copy), "--autonpo")
    return MethodRun(copy, read_transitions(copy)[-1]["branch"])


def read_transitions(run: Path) -> list[dict[str, Any]]:
    """The transitions of AutoNPO."""
    return [json.loads(line) for line in (run / "autonpo.jsonl").read_text().splitlines()]


@cache
def read_cost_records(place: MethodRun) -> list[dict[str, Any]]:
    """Curve points and crossings of one arm, as `npo show RUN costs --json` prints them."""
    command = [*NPO, "show", str(place.run), "costs", "--branch", place.branch, "--json"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def curve_points(place: MethodRun) -> list[dict[str, Any]]:
    """Its evaluations by logical step."""
    return [row for row in read_cost_records(place) if row["record"] == "curve_point"]


def final_accuracy(place: MethodRun) -> float:
    """Mean of the last three evaluations."""
    return statistics.fmean(point["accuracy"] for point in curve_points(place)[-3:])


def costs_to_threshold(places: Sequence[MethodRun], threshold: float, *, axis: str) -> list[float | None]:
    """Cost of reaching the threshold, one value a seed; None where it was not reached."""
    found = []
    for place in places:
        rows = [
            row for row in read_cost_records(place) if row["record"] == "crossing" and row["threshold"] == threshold
        ]
        found.append(rows[0][axis])
    return found


def interval(values: Sequence[float]) -> str:
    """Mean over seeds with its 95 % t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_95[min(8, len(values))] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def speed_up(slow: Sequence[float | None], fast: Sequence[float | None], start: int = 0) -> str:
    """Mean over seeds of the paired ratio, 95 % t interval; seeds in which an arm never arrived are left out."""
    pairs = [(a - start, b - start) for a, b in zip(slow, fast, strict=True) if a is not None and b is not None]
    ratios = [a / b for a, b in pairs if a > 0 and b > 0]
    if len(ratios) < 2:
        return " ".join(f"{ratio:.2f}x" for ratio in ratios) or "-"
    half = T_95[min(8, len(ratios))] * statistics.stdev(ratios) / len(ratios) ** 0.5
    mean = statistics.fmean(ratios)
    return f"{mean:.2f}x [{mean - half:.2f}, {mean + half:.2f}] ({len(ratios)} of {len(slow)})"


def format_costs(values: Sequence[float | None]) -> str:
    """Mean over the seeds that arrived, and how many did."""
    there = [value for value in values if value is not None]
    return f"{statistics.fmean(there):,.0f} ({len(there)} of {len(values)})" if there else f"- (0 of {len(values)})"


def method_rows(name: str, places: Sequence[MethodRun]) -> list[str]:
    """What one arm reached and what it cost, a line a threshold."""
    final = interval([final_accuracy(place) for place in places])
    return [
        f"| {name} | {final} | {threshold} | "
        + " | ".join(format_costs(costs_to_threshold(places, threshold, axis=axis)) for axis in COSTS)
        + " |"
        for threshold in THRESHOLDS
    ]


def ratio_rows(arm: Method, plain: Sequence[MethodRun], helped: Sequence[MethodRun]) -> list[str]:
    """GRPO's cost over the arm's, paired by seed; the last line counts steps from the rollback point only."""
    better = sum(final_accuracy(b) >= final_accuracy(a) for a, b in zip(plain, helped, strict=True))
    lines = []
    for threshold in THRESHOLDS:
        slow, fast = (
            [costs_to_threshold(places, threshold, axis=axis) for axis in COSTS] for places in (plain, helped)
        )
        ratios = [speed_up(*pair) for pair in zip(slow, fast, strict=True)]
        note = f"not lower on {better} of {len(plain)}"
        lines.append(f"| {arm.name}, ratio | {note} | {threshold} | {' | '.join(ratios)} |")
        if arm.at:
            lines.append(
                f"| {arm.name}, ratio from step {arm.at} | | {threshold} | "
                f"{speed_up(slow[0], fast[0], start=arm.at)} | | | |"
            )
    return lines


def entropy_rows(plan: Experiment, seeds: Sequence[dict[str, MethodRun]]) -> list[str]:
    """Training entropy of every arm at eight places of the run, mean over the seeds."""
    steps = [round(plan.steps * part / 80) * 10 for part in range(1, 9)]
    lines = [f"| entropy at step | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for name in seeds[0]:
        curves = [{row["step"]: row["entropy"] for row in curve_points(places[name])} for places in seeds]
        values = [[curve[step] for curve in curves if curve.get(step) is not None] for step in steps]
        lines.append(
            f"| {name} | " + " | ".join(f"{statistics.fmean(some):.3f}" if some else "-" for some in values) + " |"
        )
    return lines


def intervention_rows(arm: Method, seeds: Sequence[dict[str, MethodRun]]) -> list[str]:
    """What AutoNPO did, a line a probe."""
    lines = ["| run | step | decision | D* | Q | V | p(best) | guides |", "|---" * 8 + "|"]
    for places in seeds:
        run = places[arm.name].run
        fewest = read_transitions(run)[0]["evidence"]["settings"]["autonpo"]["rollback"]["min_failed_prompts"]
        for move in read_transitions(run):
            if move["event"] in ("accepted", "rejected", "early"):
                scores = move["evidence"].get("scores", ())
                best = next((score for score in scores if score["chosen"]), None)
                rivals = sum(score["num_mistakes"] >= fewest for score in scores)
                lines.append(f"| {run.name} | {move['step']} | {move['event']} | {format_choice(best, rivals)} | - |")
            elif move["event"] == "guided":
                found = f"{move['evidence']['num_found']} of {move['evidence']['num_asked']}"
                lines[-1] = f"{lines[-1][:-3]}{found} |"
    return lines


def format_choice(score: dict[str, Any] | None, rivals: int) -> str:
    """D*, Q, V, and the chance that it is the best of so many distances, as cells."""
    if score is None:
        return "- | - | - | -"
    quality = f"{score['quality']:.3f} [{score['quality_low']:.3f}, {score['quality_high']:.3f}]"
    return f"{score['distance']} | {quality} | {score['variance']:.2f} | {score['p_best']:.2f} of {rivals}"


def table(plan: Experiment, seeds: Sequence[dict[str, MethodRun]]) -> list[str]:
    """Markdown lines."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    plain = [places[GRPO] for places in seeds]
    lines += method_rows("GRPO", plain)
    for arm in plan.methods:
        helped = [places[arm.name] for places in seeds]
        lines += [*method_rows(arm.name, helped), *ratio_rows(arm, plain, helped)]
    if plan.methods:
        lines += ["", *entropy_rows(plan, seeds)]
    for arm in plan.methods:
        if arm.at is None:
            lines += ["", *intervention_rows(arm, seeds)]
    return lines


def parse_method(text: str) -> Method:
    """`late=40:100`, or `NAME=auto KEY=VALUE ...`."""
    name, _, rest = text.partition("=")
    kind, *settings = rest.split() or [""]
    if kind == AUTO:
        return Method(name=name, settings=tuple(settings))
    at, _, guide = kind.partition(":")
    if settings or not (at.isdecimal() and guide.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=AT:GUIDE, or 'NAME={AUTO} KEY=VALUE ...'")
    return Method(name=name, at=int(at), guide=int(guide))


def main() -> None:
    """Run the seeds, side by side as `--jobs` allows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--lr", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--arm", action="append", default=[], type=parse_method, metavar="NAME=AT:GUIDE|NAME=auto")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    plan = Experiment(
        recipe=given.recipe, lr=given.lr, steps=given.steps, methods=tuple(given.arm), extra=tuple(given.set)
    )
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(lambda seed: run_seed(plan, seed, given.out), seeds))
    sys.stdout.write("\n".join(table(plan, found)) + "\n")


if __name__ == "__main__":
    main()
