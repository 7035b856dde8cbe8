"""Branches with a merged start: weights, optimizer, checkpoint of the fork step, kills, costs, forks, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npo_cli.api.training import resume as resume_api
from npo_cli.errors import NpoError
from npo_cli.storage.checkpoints import find_checkpoint, find_resume_checkpoint
from npo_cli.storage.cost_sums import best_held_curve, cost_at, learning_curve
from npo_cli.storage.index import select_line_evals
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_first_segment
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.removal import remove_branch
from npo_cli.storage.retention import find_protected_checkpoints
from npo_cli.storage.verify import verify_run
from npo_cli.training.dry_run import plan_resume
from npo_cli.types.rollouts import CheckpointSaved
from tests.distributed.test_two_processes import assert_same_metrics
from tests.helpers.runs import LORA, copy_run, reproducible_digests, resume, start_resume, train
from tests.helpers.torchrun import run as launch

REJOIN = {"at": 4, "source_branch": "replay", "new_branch": "rejoined", "merge": "main:4,minus=main:2,weight=0.25"}
SIX = "train.num_steps=6"


@pytest.fixture(scope="module")
def replayed(tmp_path_factory) -> Path:
    """main to step 4, and a replay of steps 3 and 4 with other samples, evaluated every other step."""
    root = tmp_path_factory.mktemp("merged") / "run"
    train(root, "eval.every=2")
    resume(root, at=2, new_branch="replay")
    return root


@pytest.fixture(scope="module")
def rejoined(replayed, tmp_path_factory) -> Path:
    root = copy_run(replayed, tmp_path_factory.mktemp("rejoined") / "run")
    resume(root, SIX, **REJOIN)
    return root


def weights(root: Path, branch: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(open_run(root), branch, step).path / "model.safetensors")


def state_files(root: Path, branch: str, step: int) -> dict[str, bytes]:
    folder = find_checkpoint(open_run(root), branch, step).training_state_path
    return {name: (folder / name).read_bytes() for name in ("optimizer.safetensors", "state.json")}


def test_rejoined_weights_are_the_replay_s_plus_a_quarter_of_what_main_moved(rejoined):
    own, replay, late, early = (
        weights(rejoined, *place) for place in (("rejoined", 4), ("replay", 4), ("main", 4), ("main", 2))
    )
    assert find_checkpoint(open_run(rejoined), "rejoined", 4).branch == "rejoined"
    for name, tensor in own.items():
        assert torch.equal(tensor, replay[name] + 0.25 * (late[name] - early[name]))
    assert any(not torch.equal(own[name], replay[name]) for name in own)
    # Moments, data position and random streams are those of the replay, whose trajectory continues.
    assert state_files(rejoined, "rejoined", 4) == state_files(rejoined, "replay", 4)
    assert [row["step"] for row in read_metrics(open_run(rejoined), "rejoined")] == [5, 6]


def test_average_without_minus_is_between_the_two_checkpoints(replayed, tmp_path):
    root = copy_run(replayed, tmp_path / "run")
    resume(root, SIX, at=4, source_branch="main", new_branch="averaged", merge="main:2,weight=0.25", until=5)
    own, late, early = (weights(root, *place) for place in (("averaged", 4), ("main", 4), ("main", 2)))
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, 0.75 * late[name] + 0.25 * early[name], rtol=1e-6, atol=1e-8)
    first = find_first_segment(open_run(root), "averaged")
    assert first.merge_spec == "main:2,minus=main:4,weight=0.25"


def test_merged_start_is_evaluated_and_belongs_to_the_line(rejoined):
    run = open_run(rejoined)
    evals = select_line_evals(run, "rejoined")
    assert {step: report.branch for step, report in evals.items()} == {
        0: "main",
        2: "main",
        4: "rejoined",
        6: "rejoined",
    }
    assert select_line_evals(run, "replay")[4].branch == "replay"
    assert not [found for found in verify_run(rejoined) if type(found).__name__ == "Damage"]
    assert {("main", 4), ("main", 2), ("replay", 4)} <= find_protected_checkpoints(run)


def test_merged_checkpoints_are_on_the_bill_once(rejoined):
    """main to 4, the replay's 2 steps and the branch's own 2; the replay alone had not paid steps 3 and 4 of main."""
    run = open_run(rejoined)
    tokens = {
        branch: {row["step"]: row["tokens"] for row in read_metrics(run, branch)} for branch in ("main", "replay")
    }
    common = tokens["main"][1] + tokens["main"][2]
    own = sum(row["tokens"] for row in read_metrics(run, "rejoined"))
    assert cost_at(run, "replay", 4).tokens == common + sum(tokens["replay"].values())
    expected = sum(tokens["main"].values()) + sum(tokens["replay"].values())
    assert cost_at(run, "rejoined", 4).tokens == expected
    assert (cost_at(run, "rejoined", 6).tokens, cost_at(run, "rejoined", 6).steps) == (expected + own, 8)
    # The merged weights have one point, at the cost of everything that they are made of.
    points = [point.total_tokens for point in learning_curve(run, "rejoined", name="x") if point.step == 4]
    assert points == [expected]
    assert {point.policy_branch for point in best_held_curve(run, "rejoined", name="x")} <= {
        "main",
        "replay",
        "rejoined",
    }


def test_merge_with_an_unrelated_branch_is_billed_once_and_ties_it_to_the_branch(replayed, tmp_path):
    """main to 2, then steps 3 and 4 of the replay and of the other branch: steps 3 and 4 of main are no part of it."""
    root = copy_run(replayed, tmp_path / "run")
    resume(root, "train.lr=3e-3", at=2, source_branch="main", new_branch="other")
    resume(root, SIX, **REJOIN | {"merge": "other:4,minus=main:2,weight=0.25"})
    run = open_run(root)
    tokens = {
        branch: [row["tokens"] for row in read_metrics(run, branch)]
        for branch in ("main", "replay", "other", "rejoined")
    }
    start = sum(tokens["main"][:2]) + sum(tokens["replay"]) + sum(tokens["other"])
    assert (cost_at(run, "rejoined", 4).tokens, cost_at(run, "rejoined", 4).steps) == (start, 6)
    assert cost_at(run, "rejoined", 6).tokens == start + sum(tokens["rejoined"])
    # theta_plus has a merged start itself: its own steps 5 and 6 are all that is new
    more = {"at": 4, "source_branch": "replay", "new_branch": "twice", "merge": "rejoined:6,weight=0.5", "until": 5}
    resume(root, SIX, **more)
    assert cost_at(run, "twice", 4).tokens == start + sum(tokens["rejoined"])
    with pytest.raises(NpoError, match="branch rejoined, branch twice depend on branch other"):
        list(remove_branch(root, "other", recursive=False, is_confirmed=True))
    planned = remove_branch(root, "other", recursive=True, is_confirmed=False)
    assert [one.path for one in planned] == ["branches/twice", "branches/rejoined", "branches/other"]


def stop_at(records: object, kind: type) -> None:
    """Drop a run where it first yields such a record."""
    for record in records:
        if isinstance(record, kind):
            records.close()


@pytest.mark.parametrize("is_saved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_merged_start_killed_before_or_after_it_is_saved_is_bitwise_identical(replayed, rejoined, tmp_path, is_saved):
    expected = reproducible_digests(rejoined, "rejoined")
    assert "checkpoints/step_000004/model.safetensors" in expected
    root = copy_run(replayed, tmp_path / "run")
    stop_at(start_resume(root, SIX, **REJOIN), CheckpointSaved)
    if not is_saved:
        (start,) = (root / "branches" / "rejoined" / "checkpoints").iterdir()
        start.rename(start.with_name(".step_000004.partial"))
        assert find_resume_checkpoint(open_run(root), "rejoined").branch == "replay"
        with pytest.raises(NpoError, match="no complete checkpoint of step 4 on branch rejoined"):
            find_checkpoint(open_run(root), "rejoined", 4)
    resume(root, source_branch="rejoined")
    assert reproducible_digests(root, "rejoined") == expected


def test_fork_of_a_merged_start_begins_with_the_merged_weights(rejoined, tmp_path):
    root = copy_run(rejoined, tmp_path / "run")
    resume(root, "autonpo.rollback.seed=same", at=4, source_branch="rejoined", new_branch="again", until=5)
    again, first = (RunDir(root).rollouts_path(branch).read_text().splitlines() for branch in ("again", "rejoined"))
    assert again == first[: len(again)]
    assert cost_at(open_run(root), "again", 4) == cost_at(open_run(root), "rejoined", 4)


def test_dry_run_of_a_merge_writes_nothing(replayed, tmp_path):
    root = copy_run(replayed, tmp_path / "run")
    options = {"guide": None, "steps": None, "overrides": (SIX,)}
    planned = list(plan_resume(root, **options, **REJOIN))
    assert any(getattr(work, "steps", "") == "5-6" for work in planned)
    assert not (root / "branches" / "rejoined").exists()


@pytest.mark.parametrize(
    ("merge", "options", "message"),
    [
        ("main:4", {}, "--merge main:4 cannot be read"),
        ("main:4,weight=0", {}, "--merge main:4,weight=0 cannot be read"),
        ("main:4,weight=nan", {}, "--merge main:4,weight=nan cannot be read"),
        ("main:3,weight=0.5", {}, "no complete checkpoint of step 3"),
        ("other:4,weight=0.5", {}, "has no branch 'other'"),
        ("replay:4,weight=0.5", {}, "adds nothing"),
        ("main:4,weight=0.5", {"fresh_optimizer": True}, "--merge is not available with --fresh-optimizer"),
        ("main:4,weight=0.5", {"guide": "near", "no_guide": False}, "--merge is not available with --guide"),
        ("main:4,weight=0.5", {"at": None, "no_guide": False, "new_branch": None}, "--merge needs --at STEP"),
    ],
)
def test_merge_is_refused_before_anything_is_written(replayed, tmp_path, merge, options, message):
    root = copy_run(replayed, tmp_path / "run")
    arguments = {"at": 4, "branch": "replay", "no_guide": True, "new_branch": "x", "overrides": [SIX]} | options
    with pytest.raises(NpoError) as caught:
        resume_api(root, merge=merge, **arguments)
    assert message in caught.value.message
    assert not (root / "branches" / "x").exists()


def test_merge_of_adapters_is_refused(tmp_path):
    train(tmp_path / "run", *LORA, until=0)
    with pytest.raises(NpoError, match=r"--merge is not available with model\.lora\.rank"):
        resume(tmp_path / "run", at=0, merge="main:0,weight=0.5")


@pytest.mark.slow
def test_merged_start_of_two_processes_equals_one(replayed, rejoined, tmp_path):
    root = copy_run(replayed, tmp_path / "double")
    options = ("--branch", "replay", "--at", "4", "--no-guide", "--new-branch", "rejoined", "--merge", REJOIN["merge"])
    launch("resume", str(root), *options, SIX, log=tmp_path / "log")
    double, single = (
        [json.loads(line) for line in RunDir(one).metrics_path("rejoined").read_text().splitlines()]
        for one in (root, rejoined)
    )
    assert_same_metrics(double, single)
    merged, expected = weights(root, "rejoined", 4), weights(rejoined, "rejoined", 4)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
