"""Training on standing mistakes first: which prompts a step draws, window, kills, staleness, LoRA, two processes."""

import json
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.layout import RunDir
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Group
from tests.distributed.test_two_processes import assert_same_metrics
from tests.helpers.runs import (
    LORA,
    TINY,
    copy_run,
    open_session_at,
    reproducible_digests,
    resume,
    start_resume,
    stop_after,
    tiny_recipe,
    train,
)
from tests.helpers.torchrun import run as launch

HALF = ("order.mistakes=0.5", "order.threshold=0.5", "train.num_steps=8")


def read_groups(root: Path, branch: str) -> dict[int, tuple[Group, ...]]:
    log = RolloutLog(RunDir(root).rollouts_path(branch))
    return {step: log.read_step(step) or () for step in log.steps()}


@pytest.fixture(scope="module")
def mistaken(scout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain GRPO to step 2; from there half of each batch of 4 are mistakes, to step 8."""
    root = copy_run(scout, tmp_path_factory.mktemp("mistaken") / "run")
    resume(root, *HALF, at=2, new_branch="first")
    return root


def test_half_of_each_batch_are_standing_mistakes_of_the_record(mistaken):
    """Prompts in order: 2 of the data order, then 2 whose newest group, on main or here, had at most 2 of 4 correct."""
    session = open_session_at(mistaken, 2, branch="first")
    pool = [prompt.prompt_id for prompt in session.task.train]
    newest: dict[str, float] = {}
    seen = {step: groups for step, groups in read_groups(mistaken, "main").items() if step <= 2}
    position, num_drawn = 8, 0
    for step, groups in (seen | read_groups(mistaken, "first")).items():
        ids = [group.prompt.prompt_id for group in groups]
        if step > 2:
            assert len(set(ids)) == 4
            standing = {prompt_id for prompt_id, accuracy in newest.items() if accuracy <= 0.5}
            assert len(standing) > 4, "or this shows nothing"
            assert ids[:2] == [pool[index] for index in session.order.indices(position, 2)]
            assert set(ids[2:]) <= standing
            position, num_drawn = position + 2, num_drawn + 2
        newest |= {group.prompt.prompt_id: group.on_policy.accuracy for group in groups}
    assert num_drawn == 12
    rows = [json.loads(line) for line in RunDir(mistaken).metrics_path("first").read_text().splitlines()]
    assert [row["data_position"] for row in rows] == [10, 12, 14, 16, 18, 20]
    assert all(row["order/mistakes"] == 2 and row["order/standing"] > 2 for row in rows)
    assert all(0 < row["order/partly_solved_forecast"] < 2 for row in rows)


def test_data_order_fills_a_batch_without_enough_mistakes(tmp_path):
    """A new run has no mistake on record; afterwards no prompt is drawn twice in a step."""
    reports = train(tmp_path / "run", "order.mistakes=1", "order.threshold=0", "train.num_steps=3")
    metrics = [report.metrics for report in reports]
    assert (metrics[0]["order/mistakes"], metrics[0]["data_position"]) == (0, 4)
    for step, groups in read_groups(tmp_path / "run", "main").items():
        assert len({group.prompt.prompt_id for group in groups}) == 4
        fresh = metrics[step - 1]["data_position"] - (metrics[step - 2]["data_position"] if step > 1 else 0)
        assert fresh >= 4 - metrics[step - 1]["order/mistakes"]


KINDS = {
    "plain": (),
    "staleness": ("train.staleness=1",),
    "two steps of staleness": ("train.staleness=2", "order.num_steps=3"),
    "lora": LORA,
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_resume_of_mistakes_first_between_checkpoints_is_bitwise_identical(tmp_path, kind, request):
    if "staleness" in kind:
        request.getfixturevalue("producers")
    settings = (*HALF, *KINDS[kind], "order.start_step=1")
    train(tmp_path / "straight", *settings)
    # Step 5 is recorded, step 4 is the newest checkpoint.
    stop_after(train_run(tmp_path / "dropped", tiny_recipe(*settings)), 5)
    resume(tmp_path / "dropped")
    straight = reproducible_digests(tmp_path / "straight")
    assert reproducible_digests(tmp_path / "dropped") == straight
    assert "checkpoints/step_000008/training_state/optimizer.safetensors" in straight


def test_fork_before_its_first_checkpoint_resumes_bit_for_bit(mistaken, scout, tmp_path):
    root = copy_run(scout, tmp_path / "dropped")
    stop_after(start_resume(root, *HALF, at=2, new_branch="first"), 3)
    resume(root)
    assert reproducible_digests(root, "first") == reproducible_digests(mistaken, "first")


def test_run_outside_the_window_of_mistakes_is_bitwise_plain(scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("plain", "over")]
    resume(roots[0], at=2, new_branch="same")
    resume(roots[1], "order.mistakes=0.5", "order.start_step=90", at=2, new_branch="same")
    assert reproducible_digests(roots[1], "same") == reproducible_digests(roots[0], "same")


def test_order_changes_at_a_fork_only(scout, tmp_path):
    with pytest.raises(NpoError) as caught:
        resume(copy_run(scout, tmp_path / "run"), *HALF)
    assert "order.mistakes cannot change" in caught.value.message


@pytest.mark.slow
def test_mistakes_first_of_two_processes_equals_one(tmp_path):
    train(tmp_path / "single", *HALF)
    launch("train", "micro", str(tmp_path / "double"), *TINY, *HALF, log=tmp_path / "log")
    double, single = (
        [json.loads(line) for line in RunDir(tmp_path / name).metrics_path("main").read_text().splitlines()]
        for name in ("double", "single")
    )
    assert_same_metrics(double, single)
    assert all(row["order/mistakes"] == 2 for row in double[1:])
