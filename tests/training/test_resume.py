"""Rolling back: the state of that step, the same prompts with other samples, and nothing that existed is touched."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npo_cli.errors import NpoError
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import read_segments
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.checkpointing import restore_state
from npo_cli.training.start_point import fork
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Notice
from tests.helpers.runs import (
    copy_run,
    file_digests,
    open_session_at,
    reproducible_digests,
    resume,
    sample,
    start_resume,
    stop_after,
    tiny_recipe,
    train,
)
from tests.helpers.teachers import correct_rows, write_traces

GROWING = {"costs.jsonl", "segments.jsonl", "events.jsonl", "evals.jsonl"}


@pytest.fixture(scope="module")
def replayed(scout, tmp_path_factory) -> Path:
    """The scout, and a branch `near` that left it at step 2 and replayed steps 3 and 4 with the guide."""
    root = copy_run(scout, tmp_path_factory.mktemp("replayed") / "run")
    resume(root, at=2, guide="near")
    return root


def groups_of(root: Path, branch: str, step: int) -> list:
    return list(RolloutLog(open_run(root).rollouts_path(branch)).read_step(step))


def test_replay_changes_no_existing_file(scout, replayed):
    before, after = file_digests(scout), file_digests(replayed)
    assert {name for name in before if after.get(name) != before[name]} <= GROWING
    for name in GROWING & before.keys():
        assert (replayed / name).read_bytes().startswith((scout / name).read_bytes())
    assert all(name.startswith("branches/near/") for name in after.keys() - before.keys())


def test_replay_has_the_same_prompts_and_new_samples(replayed):
    for step in (3, 4):
        first, again = groups_of(replayed, "main", step), groups_of(replayed, "near", step)
        assert [group.prompt for group in again] == [group.prompt for group in first]
        own = [[rollout.response_ids for rollout in group.rollouts if rollout.source == "own"] for group in again]
        assert own != [[rollout.response_ids for rollout in group.rollouts] for group in first]


def test_rollback_restores_weights_moments_position_and_random_streams(replayed):
    session = open_session_at(replayed, 2)
    optimizer = build_optimizer(session.policy.model, session.recipe.train)
    checkpoint = find_checkpoint(session.run, "near", 2)
    assert checkpoint.branch == "main"
    state = restore_state(session, optimizer, checkpoint)
    # 2 steps of 4 prompts
    assert (state.step, state.position) == (2, 8)
    weights = load_file(checkpoint.path / "model.safetensors")
    moments = load_file(checkpoint.training_state_path / "optimizer.safetensors")
    for name, parameter in session.policy.model.named_parameters():
        assert torch.equal(parameter, weights[name])
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[parameter][key], moments[f"{name}.{key}"])
    assert torch.equal(torch.get_rng_state(), moments["rng.torch"])
    assert (
        state.running_metrics
        == json.loads((checkpoint.training_state_path / "state.json").read_text())["running_metrics"]
    )


def test_replay_without_a_guide_is_grpo_on_a_new_branch(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    resume(root, at=2)
    newest = read_segments(open_run(root))[-1]
    assert (newest.branch, newest.parent, newest.fork_step, newest.guide_cache) == ("main-from-2", "main", 2, None)
    assert {group.injection_status for group in groups_of(root, "main-from-2", 4)} == {"off"}


def test_fork_uses_its_own_learning_rate_and_schedule_and_its_ancestor_does_not(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    before = reproducible_digests(root)
    changes = ("train.lr=1e-3", "train.schedule=linear", "train.min_lr_ratio=0", "train.num_steps=8")
    resume(root, *changes, at=2, new_branch="slower", until=5)
    run = open_run(root)
    # linear from 1e-3 at step 0 to 0 at step 8
    assert [row["lr"] for row in read_metrics(run, "slower")] == pytest.approx([1e-3 * (1 - n / 8) for n in (3, 4, 5)])
    assert [row["lr"] for row in read_metrics(run, "main")] == [3e-4] * 4
    assert run.read_recipe("main")["train"]["lr"] == 3e-4
    assert reproducible_digests(root) == before
    resume(root, "train.num_steps=6", source_branch="main")
    resume(root, source_branch="slower")
    assert [row["lr"] for row in read_metrics(run, "main")] == [3e-4] * 6
    assert list(read_metrics(run, "slower"))[-1]["lr"] == 0


def test_resume_of_an_interrupted_replay_continues_branch_and_guide(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    stop_after(start_resume(root, "train.num_steps=6", at=2, guide="near"), 3)
    resume(root)
    assert [(entry.branch, entry.guide_cache, entry.guide_until) for entry in read_segments(open_run(root))] == [
        ("main", None, None),
        ("near", "near", 4),
        ("near", "near", 4),
    ]
    # The guide was sampled for steps 3 and 4; after them it is off.
    mixes = {step: {group.injection_status for group in groups_of(root, "near", step)} for step in (3, 4, 5, 6)}
    assert mixes[5] == mixes[6] == {"off"}
    assert "off" not in mixes[3] | mixes[4]


def test_replay_injects_the_guide_for_the_given_steps(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    resume(root, at=2, guide="near", steps=1)
    assert {group.injection_status for group in groups_of(root, "near", 4)} == {"off"}
    assert "off" not in {group.injection_status for group in groups_of(root, "near", 3)}


def test_replay_branch_name_is_new(replayed, tmp_path):
    root = copy_run(replayed, tmp_path / "run")
    resume(root, "guide.inject.ratio=exact", at=2, guide="near", source_branch="main")
    assert read_segments(open_run(root))[-1].branch == "near-2"
    assert open_run(root).read_recipe("near-2")["guide"]["inject"]["ratio"] == "exact"


def test_resume_with_more_steps_continues_at_the_end(scout, tmp_path):
    root = copy_run(scout, tmp_path / "more")
    resume(root, "train.num_steps=6")
    train(tmp_path / "straight", "train.num_steps=6")
    names = ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step_000006/model.safetensors")
    for name in names:
        assert (root / "branches/main" / name).read_bytes() == (tmp_path / "straight/branches/main" / name).read_bytes()


def test_resume_of_a_finished_run_is_refused_with_a_hint(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    with pytest.raises(NpoError) as caught:
        resume(root)
    assert caught.value.message == "the run has completed step 4 of 4"
    assert caught.value.hint == f"npo resume {root} train.num_steps=8"
    assert file_digests(root) == file_digests(scout)


def test_replay_refuses_a_guide_of_another_step(scout):
    with pytest.raises(NpoError, match="guide near was sampled for step 2 of main, not step 0 of main"):
        fork(open_run(scout), None, 0, overrides=(), guide="near", new_branch=None, steps=None)


def test_replay_refuses_a_guide_without_a_response(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    with closing(open_session_at(root, 2)) as session:
        rows = [row | {"response": "no answer"} for row in correct_rows(session.task.train)]
    traces = write_traces(tmp_path / "traces.jsonl", rows)
    sample(root, source=f"file:{traces}", at=2, name="empty")
    before = file_digests(root)
    with pytest.raises(NpoError, match="guide empty has no response: its source solved none of its"):
        resume(root, at=2, guide="empty")
    assert file_digests(root) == before


def test_resume_refuses_a_checkpoint_of_weights_only(tmp_path):
    root = tmp_path / "run"
    train(root, "train.keep_full_checkpoints=1")
    before = file_digests(root)
    with pytest.raises(NpoError, match="step 2 of main has weights only"):
        resume(root, at=2)
    assert file_digests(root) == before


def test_replay_of_a_replay_uses_checkpoints_of_its_own_branch(replayed, tmp_path):
    root = copy_run(replayed, tmp_path / "run")
    info = sample(root, name="nearer", branch="near")
    assert info.branch == "near"
    resume(root, at=2, guide="nearer")
    assert [group.prompt for group in groups_of(root, "nearer", 3)] == [
        group.prompt for group in groups_of(root, "main", 3)
    ]


def test_train_refuses_a_used_directory(scout):
    with pytest.raises(NpoError, match="already holds a run"):
        next(train_run(scout, tiny_recipe()))


def test_resume_warns_of_a_guide_that_was_sampled_for_a_lower_gate(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    sample(root, "guide.cache.prompts=failed", name="failed")
    for gate, num_warnings in ((0.6, 0), (0.8, 1)):
        records = start_resume(root, f"guide.inject.max_accuracy={gate}", at=2, guide="failed")
        found = list(itertools.takewhile(lambda record: isinstance(record, Notice), records))
        records.close()
        assert sum("sample it again with guide.inject.max_accuracy=0.8" in one.message for one in found) == num_warnings
