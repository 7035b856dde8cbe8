"""Hand-written metrics on which every transition of the controller is known."""

import json
from pathlib import Path

from npo_cli.storage.costs import CostLine, costs_path, encode_cost
from npo_cli.storage.files import make_folder
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from tests.storage.builders import new_run

SENSITIVE_TRIGGER = (
    *(
        "autonpo.trigger.ema_decay=0",
        "autonpo.trigger.window=5",
        "autonpo.trigger.patience=3",
        "autonpo.trigger.max_reward_gain_se=1",
        "autonpo.trigger.min_entropy_drop_se=0",
        "autonpo.trigger.min_entropy_drop=0.05",
    ),
    *(
        "autonpo.trigger.warmup_steps=10",
        "autonpo.trigger.cooldown_steps=4",
        "autonpo.max_interventions=2",
        "autonpo.rollback.distances=[5,10,20]",
    ),
)
"""No averaging. On constant rewards: armed at 11, the streak is 11, 12, 13; cooldown of 4 steps."""


def constant_reward_rows(num_steps: int) -> list[dict[str, float]]:
    """A constant reward (gain 0 <= 0) while the entropy falls by 2 % per step: 9.6 % in 5."""
    return [{"step": step, "reward": 0.5, "entropy": 0.98**step} for step in range(1, num_steps + 1)]


def write_metrics_file(folder: Path, rows: list[dict[str, float]], name: str = "metrics.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(folder: Path, rows: list[dict[str, float]]) -> RunDir:
    """A run with these metrics and their costs."""
    run = new_run(folder)
    append_metrics(run, "main", rows)
    return run


def append_metrics(run: RunDir, branch: str, rows: list[dict[str, float]]) -> None:
    """Each step has one update and 10 tokens."""
    make_folder(run.branch_folder(branch))
    JsonlLog(run.metrics_path(branch)).extend([{"branch": branch, "tokens": 10, **row} for row in rows])
    lines = [
        CostLine(kind="train", branch=branch, step=int(row["step"]), updates=1, tokens=10, forwards=10) for row in rows
    ]
    JsonlLog(costs_path(run)).extend([encode_cost(line) for line in lines])
