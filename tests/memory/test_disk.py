"""How much of a disk a run takes: by hand, and beside a real run."""

from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe
from npo_cli.memory.disk import count_kept_checkpoints, estimate_disk_usage
from npo_cli.memory.model_shape import model_shape
from npo_cli.memory.planner import checkpoint_bytes
from tests.helpers.runs import tiny_recipe, train


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        # steps 0, 10, ..., 100 are 11
        ((), (11, 0)),
        (("train.keep_full_checkpoints=2",), (3, 8)),
        (("train.keep_full_checkpoints=2", "train.keep_weights_only=5"), (3, 5)),
        (("train.keep_full_checkpoints=50",), (11, 0)),
    ],
)
def test_quotas_leave_full_states_and_guides(quotas, expected):
    assert count_kept_checkpoints(load_recipe("micro", ["train.save_every=10", *quotas]), 100) == expected


def test_a_replay_of_autonpo_is_a_branch_of_its_own():
    settings = [
        "train.num_steps=100",
        "train.save_every=10",
        "autonpo.rollback.distances=[20,40]",
        "autonpo.max_interventions=2",
        "guide.cache.samples_per_prompt=8",
    ]
    recipe = load_recipe("micro", [*settings, "train.prompts_per_step=4", "train.group_size=4"])
    alone, watched = (
        {
            need.label: need.num_bytes
            for need in estimate_disk_usage(recipe, weights=10, optimizer_state=20, full_model=0, autonpo=on)
        }
        for on in (False, True)
    )
    assert alone["checkpoints of the run's branch"] == 11 * 30 - 20
    # 2 x 40 steps: 8 saves and a first one
    assert watched["checkpoints of up to 2 replays of AutoNPO"] == 9 * 30 - 20
    # 180 steps instead of 100; three caches instead of one
    assert watched["journals"] == pytest.approx(1.8 * alone["journals"])
    assert watched["guide caches"] == 3 * alone["guide caches"]


def test_the_estimate_is_what_a_real_run_takes(tmp_path):
    settings = ("train.num_steps=12", "train.prompts_per_step=8", "task.pool_size=64")
    train(tmp_path / "run", *settings)
    recipe = tiny_recipe(*settings)
    weights, moments = checkpoint_bytes(recipe, model_shape(recipe.model))
    needs = estimate_disk_usage(recipe, weights=weights, optimizer_state=moments, full_model=0, autonpo=False)
    planned = {need.label: need.num_bytes for need in needs}
    checkpoints = sized(tmp_path / "run" / "branches" / "main" / "checkpoints")
    journals = sized(tmp_path / "run") - checkpoints
    # 7 full states, the first without moments; beside the tensors a few kB of JSON each
    assert planned["checkpoints of the run's branch"] == pytest.approx(checkpoints, rel=0.03)
    # responses may end before the limit
    assert journals == pytest.approx(planned["journals"], rel=0.25)


def test_a_server_is_given_the_whole_model_once_and_what_is_trained_at_each_sync():
    recipe = load_recipe("micro", ["engine.kind=vllm_server"])
    needs = estimate_disk_usage(recipe, weights=10, optimizer_state=20, full_model=400, autonpo=False)
    assert {need.label: need.num_bytes for need in needs}["weights for the server"] == 400 + 10
    alone = estimate_disk_usage(load_recipe("micro", []), weights=10, optimizer_state=20, full_model=400, autonpo=False)
    assert "weights for the server" not in {need.label for need in alone}


def sized(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
