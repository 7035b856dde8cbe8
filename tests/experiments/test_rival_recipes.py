"""The recipes of controls and rivals: each plan, command by command, on a tiny run of micro."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npo_cli.experiments.bench_plan import BenchRun, build_commands, check_plan
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_newest_branch
from tests.helpers.cli_errors import npo
from tests.helpers.runs import TINY

pytestmark = pytest.mark.slow
SETTINGS = (
    *TINY,
    *("train.num_steps=24", "guide.replay.at_step=20", "guide.replay.guide_step=22"),
    *("autonpo.early.scout_steps=4", "autonpo.early.replay_steps=4", "guide.cache.min_yield=0"),
)


def train_by_plan(folder: Path, method: str) -> tuple[Path, list[dict]]:
    """The run, and the metrics of its last branch."""
    cell = BenchRun(recipe="micro", method=method, settings=SETTINGS, seed=7, folder=folder, teacher="")
    check_plan(cell)
    for command in build_commands(cell):
        found = npo(*command)
        assert found.code == 0, found
    run = open_run(cell.run)
    path = run.metrics_path(find_newest_branch(run))
    return cell.run, [json.loads(line) for line in path.read_text().splitlines()]


def test_rlsd_weighs_tokens_from_the_first_step(tmp_path):
    _, rows = train_by_plan(tmp_path, "rlsd")
    assert [row["target/coefficient"] for row in rows[:2]] == pytest.approx([0.5, 0.49])
    assert len(rows) == 24 and all(row["target/rollouts"] == 16 for row in rows)


def test_b_opsd_has_a_target_in_the_first_half_of_the_scouts_steps(tmp_path):
    root, rows = train_by_plan(tmp_path, "b-opsd")
    assert [row["step"] for row in rows if "target/coefficient" in row] == [1, 2]
    assert sum(row.get("target/rollouts", 0) for row in rows) > 0
    assert not any("inject/slots" in row for row in rows)
    # The scout of 4 steps, the guide's samples, and its own 24 steps.
    assert cost_at(open_run(root), "dense", 24).steps == 28


def test_policy_reheater_distils_all_rollouts_of_the_plateau(tmp_path):
    _, rows = train_by_plan(tmp_path, "policy-reheater")
    assert [row["step"] for row in rows] == [21, 22, 23, 24]
    assert all(row["target/kl"] > 0 and row["target/rollouts"] == 16 for row in rows)
    assert all(row["clip_ratio/low"] == 0 for row in rows if "clip_ratio/low" in row)


def test_adaptive_entropy_logs_its_coefficient(tmp_path):
    _, rows = train_by_plan(tmp_path, "adaptive-entropy")
    for row in rows:
        assert (row["entropy_bonus"] > 0) <= (row["entropy"] <= 0.2)


def test_sft_then_grpo_samples_nothing_while_it_is_fine_tuned(tmp_path):
    root, rows = train_by_plan(tmp_path, "sft-then-grpo")
    assert [row["step"] for row in rows] == list(range(3, 25))
    assert all(row["tokens"] > 0 for row in rows)
    sft = [json.loads(line) for line in open_run(root).metrics_path("sft").read_text().splitlines()]
    assert [(row["step"], row["tokens"]) for row in sft] == [(1, 0), (2, 0)]
    assert sum(row["rows_trained"] for row in sft) > 0


def test_token_weight_extrapolated_weighs_tokens_by_an_older_copy(tmp_path):
    root, rows = train_by_plan(tmp_path, "token-weight-extrapolated")
    assert [row["step"] for row in rows] == [21, 22, 23, 24]
    assert sum(row["target/tokens"] for row in rows) > 0
    # Nothing but the steps themselves was trained for it.
    assert cost_at(open_run(root), "control", 24).steps == 24


def test_rl_extra_extends_the_motion_of_training(tmp_path):
    root, rows = train_by_plan(tmp_path, "rl-extra")
    assert [row["step"] for row in rows] == [23, 24]
    weights = [
        load_file(open_run(root).checkpoint_folder(branch, step) / "model.safetensors")
        for branch, step in (("jumped", 22), ("main", 22), ("main", 20))
    ]
    for name, jumped in weights[0].items():
        now, before = (each[name] for each in weights[1:])
        assert torch.allclose(jumped, 1.25 * now - 0.25 * before, atol=1e-6)
