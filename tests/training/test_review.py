"""Training with a review queue: what a step reviews, kills, forks, staleness, two processes."""

import json
from pathlib import Path

import pytest

from npo_cli.rollout.batch import plan_next_batch
from npo_cli.seeds import derive_seed
from npo_cli.storage.layout import RunDir
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import open_revisits, train_run
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

SOME_SOLVED = ("task.pool_size=32", "task.hard_share=0.1", "sampling.temperature=0.7", "train.group_size=2")
"""About half of the groups are all correct, and about half of these again."""
REVIEW = (
    *("order.review.fraction=0.5", "order.review.every=2", "order.review.first_step=3"),
    *("order.review.enqueue_probability=0.8", "train.num_steps=8"),
)


def read_groups(root: Path, branch: str = "main") -> dict[int, tuple[Group, ...]]:
    log = RolloutLog(RunDir(root).rollouts_path(branch))
    return {step: log.read_step(step) or () for step in log.steps()}


def read_metrics(root: Path, branch: str = "main") -> list[dict]:
    return [json.loads(line) for line in RunDir(root).metrics_path(branch).read_text().splitlines()]


def check_reviews(groups: dict[int, tuple[Group, ...]], *, first_step: int) -> dict[str, int]:
    """Steps of one epoch against a list: the last 2 of 4 prompts of even steps are its head. Returns what happened."""
    queue: list[str] = []
    counts = {"graduated": 0, "regressed": 0}
    for step, seen in groups.items():
        assert [len(group.rollouts) for group in seen] == [2, 2, 2, 2], "no rollouts are added"
        solved = {group.prompt.prompt_id: group.num_correct == 2 for group in seen}
        reviewed = queue[:2] if step % 2 == 0 and step >= first_step else []
        names = list(solved)
        assert names[4 - len(reviewed) :] == reviewed
        kept = [name for name in reviewed if not solved[name]]
        new = [
            name
            for name in names[: 4 - len(reviewed)]
            if solved[name] and derive_seed(0, "review", step, name) / 2**63 < 0.8
        ]
        queue = queue[len(reviewed) :] + kept + new
        counts["regressed"] += len(kept)
        counts["graduated"] += len(reviewed) - len(kept)
    return counts | {"queue_size": len(queue)}


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reviewed") / "run"
    train(root, *SOME_SOLVED, *REVIEW)
    return root


def test_half_of_each_second_batch_are_reviews_of_solved_prompts(reviewed):
    counts = check_reviews(read_groups(reviewed), first_step=3)
    assert min(counts.values()) > 0, "or this shows little"
    rows = read_metrics(reviewed)
    # The data order moves by the prompts that came from it.
    assert [row["data_position"] for row in rows] == [4, 8, 12, 14, 18, 20, 24, 26]
    assert [row.get("order/reviewed") for row in rows] == [None, None, None, 2, None, 2, None, 2]
    for name in ("graduated", "regressed"):
        assert sum(row.get(f"order/{name}", 0) for row in rows) == counts[name]
    assert rows[-1]["order/queue_size"] == counts["queue_size"]


def test_review_has_sampling_seeds_of_its_own(reviewed):
    session = open_session_at(reviewed, 2)
    revisits = open_revisits(session, "main", fork_step=0, step=3)
    plan = plan_next_batch(session, seed_name="main", step=4, position=12, guides=None, revisits=revisits)
    planned = [(part.seed_label, [prompt.prompt_id for prompt in part.prompts]) for part in plan.prompt_batches]
    names = [group.prompt.prompt_id for group in read_groups(reviewed)[4]]
    assert planned == [((0,), names[:2]), (("review",), names[2:])]


KINDS = {
    "plain": (),
    "staleness": ("train.staleness=1",),
    "two steps of staleness": ("train.staleness=2",),
    "lora": LORA,
    "small pool": ("task.pool_size=6", "order.review.max_size=3"),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_resume_with_a_review_queue_between_checkpoints_is_bitwise_identical(reviewed, tmp_path, kind, request):
    if "staleness" in kind:
        request.getfixturevalue("producers")
    settings = (*SOME_SOLVED, *REVIEW, *KINDS[kind])
    straight = reviewed
    if kind != "plain":
        train(straight := tmp_path / "straight", *settings)
    # Step 5 is recorded, step 4 is the newest checkpoint.
    stop_after(train_run(tmp_path / "dropped", tiny_recipe(*settings)), 5)
    resume(tmp_path / "dropped")
    expected = reproducible_digests(straight)
    assert reproducible_digests(tmp_path / "dropped") == expected
    assert "checkpoints/step_000008/training_state/optimizer.safetensors" in expected
    if "staleness" in kind:
        assert check_reviews(read_groups(straight), first_step=3)["regressed"] > 0


@pytest.mark.slow
def test_fork_reviews_what_its_parent_solved(tmp_path):
    root = tmp_path / "run"
    train(root, *SOME_SOLVED)
    dropped = copy_run(root, tmp_path / "dropped")
    resume(root, *REVIEW, at=2, new_branch="review")
    before = {step: groups for step, groups in read_groups(root).items() if step <= 2}
    counts = check_reviews(before | read_groups(root, "review"), first_step=3)
    assert counts["graduated"] + counts["regressed"] > 0
    stop_after(start_resume(dropped, *REVIEW, at=2, new_branch="review"), 3)
    resume(dropped)
    assert reproducible_digests(dropped, "review") == reproducible_digests(root, "review")


@pytest.mark.slow
def test_run_before_its_first_review_is_bitwise_plain(reviewed, tmp_path):
    train(tmp_path / "plain", *SOME_SOLVED, "train.num_steps=3")
    rows = [{k: v for k, v in row.items() if "order/" not in k} for row in read_metrics(reviewed)[:3]]
    assert read_metrics(tmp_path / "plain") == rows


@pytest.mark.slow
def test_review_of_two_processes_equals_one(reviewed, tmp_path):
    launch("train", "micro", str(tmp_path / "double"), *TINY, *SOME_SOLVED, *REVIEW, log=tmp_path / "log")
    double = read_metrics(tmp_path / "double")
    assert_same_metrics(double, read_metrics(reviewed))
    assert sum(row.get("order/reviewed", 0) for row in double) > 0
