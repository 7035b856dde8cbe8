"""Pool calibrations of several runs into one table of rules, as Markdown and CSV.

    npo calibrate runs/a --at 0,40 --candidates self,+20,+60 --json > a.json      # and so on, one file per run
    python recipes/pool_calibrations.py a.json b.json --csv rules.csv --gains gains.csv

A row per rule: means over runs of its rank correlation, regret, share of the best gain, and share of the best gain per
cost, each over the learners of a run; and its regret minus that of the trivial rules. Intervals are 95 % percentiles of
a bootstrap over runs; with fewer than three runs there are none. The gains are a row per run, learner and candidate.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

RESAMPLES, SEED = 10_000, 0
FIGURES = ("regret", "rank_correlation", "share", "share_per_cost")
TRIVIAL = ("farthest", "Q", "Q_net")
MIN_RUNS = 3
VARIANCE_KINDS = ("kl_exp", "tok2")
GAIN_COLUMNS = (
    *("run and seed", "learner step", "candidate", "gain", "gain low", "gain high", "Q", "Q net"),
    *(f"V {kind}" for kind in VARIANCE_KINDS),
    "price in steps",
)


def read_rules(path: Path) -> dict[str, dict[str, float]]:
    """The figures of each rule in one file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {row["rule"]: row for row in rows if row["record"] == "rule_result"}
    if not found:
        raise SystemExit(f"{path} has no rule: write it with npo calibrate --json")
    return {
        rule: {name: row[name] for name in FIGURES}
        | {f"regret minus {other}": row["regret"] - found[other]["regret"] for other in TRIVIAL}
        for rule, row in found.items()
    }


def list_gains(path: Path) -> list[list[str]]:
    """A row per learner and candidate: gain with its interval, Q, V and price in steps."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        [
            path.stem,
            str(row["learner_step"]),
            row["candidate"],
            *(f"{row[name]:.3f}" for name in ("gain", "gain_low", "gain_high", "quality", "quality_net")),
            *(f"{row['variances'][kind]:.3f}" for kind in VARIANCE_KINDS),
            f"{row['price']:.1f}",
        ]
        for row in rows
        if row["record"] == "candidate_gain"
    ]


def pool(values: list[float]) -> tuple[float, str]:
    """The mean over runs, and the mean with its interval as text."""
    found = np.array(values, dtype=np.float64)
    if len(found) < MIN_RUNS:
        return float(found.mean()), f"{found.mean():.3f}"
    picks = np.random.default_rng(SEED).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.percentile(found[picks].mean(axis=1), (2.5, 97.5))
    return float(found.mean()), f"{found.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Print the table; write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="output of npo calibrate --json, one file per run")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument("--gains", type=Path, help="write the gain, Q and V of every candidate there")
    arguments = parser.parse_args()
    runs = [read_rules(path) for path in arguments.files]
    columns = [*FIGURES, *(f"regret minus {other}" for other in TRIVIAL)]
    shared = [rule for rule in runs[0] if all(rule in run for run in runs)]
    pooled = {rule: {name: pool([run[rule][name] for run in runs]) for name in columns} for rule in shared}
    rows = [
        [rule, *(pooled[rule][name][1] for name in columns)]
        for rule in sorted(shared, key=lambda rule: pooled[rule]["regret"][0])
    ]
    print("| " + " | ".join(["rule", *columns]) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if arguments.csv is not None:
        write_csv(arguments.csv, [["rule", *columns], *rows])
    if arguments.gains is not None:
        write_csv(arguments.gains, [list(GAIN_COLUMNS), *(row for path in arguments.files for row in list_gains(path))])


def write_csv(path: Path, rows: list[list[str]]) -> None:
    """Rows, the first of them the names of the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
