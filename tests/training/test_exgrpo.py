"""ExGRPO in the real loop: half of a batch from the memory, a slot a stored answer, and the same after a kill."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.rollout.batch import draw_from_order
from npo_cli.rollout.replay_buffer import build_replay_batch, select_successes, skip_retired
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.guides import ReplayBuffer, Success
from tests.helpers.runs import copy_run, file_digests, open_session_at, resume, sample, start_resume, train

EXGRPO = (
    *(
        "guide.experience.replay_fraction=0.5",
        "guide.experience.start_accuracy=0.0",
        "guide.inject.ratio=exact",
        "guide.inject.ratio_shaping=soft",
        "guide.inject.clip_off_policy=false",
    ),
    *("train.num_steps=8", "task.kind=any", "train.lr=1e-4"),
)


@pytest.fixture(scope="module")
def replaying(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exgrpo") / "run"
    train(root, *EXGRPO)
    return root


def memory_at(root: Path, step: int) -> ReplayBuffer:
    return read_trainer_state(find_checkpoint(open_run(root), "main", step).training_state_path).replay_buffer


def groups_of(root: Path, step: int) -> list:
    return list(RolloutLog(open_run(root).rollouts_path("main")).read_step(step))


def test_exgrpo_replays_half_of_a_batch(replaying):
    seen = 0
    for step in range(1, 9):
        groups = groups_of(replaying, step)
        assert len(groups) == 4
        replayed = [group for group in groups if group.injection_status == "injected"]
        assert len(replayed) <= 2
        for group in replayed:
            *own, past = group.rollouts
            # three fresh ones and the stored answer: its slot was not sampled
            assert [rollout.source for rollout in own] == ["own"] * 3
            assert (past.source, past.slot, past.reward) == ("past", 3, 1.0)
            assert past.sampler_step < step - 1
            seen += 1
        assert all(len(group.rollouts) == 4 for group in groups)
    assert seen >= 4, "the memory was hardly used, so this shows nothing"


def test_exgrpo_stores_behavior_logprobs(replaying):
    memory = memory_at(replaying, 8)
    assert memory.successes
    written = {
        (group.prompt.prompt_id, rollout.text, step - 1): rollout
        for step in range(1, 9)
        for group in groups_of(replaying, step)
        for rollout in group.rollouts
        if not rollout.is_off_policy
    }
    for prompt_id, stored in memory.successes.items():
        for success in stored:
            rollout = written[prompt_id, success.text, success.step]
            assert success.behavior_logps == pytest.approx(rollout.behavior_logps, abs=1e-5)
            assert success.response_ids == rollout.response_ids


def test_exgrpo_replayed_prompts_do_not_advance_the_data_order(replaying):
    run = open_run(replaying)
    lines = [json.loads(line) for line in run.metrics_path("main").read_text().splitlines()]
    before = 0
    for line in lines:
        fresh = sum(group.injection_status != "injected" for group in groups_of(replaying, line["step"]))
        assert line["data_position"] - before == fresh
        before = line["data_position"]
    assert lines[-1]["experience/responses"] >= lines[-1]["experience/prompts"] > 0


@pytest.mark.parametrize("after", [pytest.param(3, marks=pytest.mark.slow), 5])
def test_exgrpo_killed_run_resumes_to_the_same_bytes(replaying, tmp_path, after):
    """Left between two steps with nothing saved since step 2 or 4: the rollout log is ahead of the checkpoint."""
    root = tmp_path / "run"
    train(root, *EXGRPO, "train.num_steps=1")
    steps = start_resume(root, "train.num_steps=8")
    for record in steps:
        if getattr(record, "step", 0) == after:
            break
    steps.close()
    resume(root)
    ours, theirs = file_digests(root), file_digests(replaying)
    for name in ("branches/main/rollouts.jsonl", "branches/main/metrics.jsonl"):
        assert ours[name] == theirs[name]
    assert memory_at(root, 8) == memory_at(replaying, 8)


def test_exgrpo_rollback_restores_the_buffer(replaying, tmp_path):
    root = copy_run(replaying, tmp_path / "run")
    resume(root, at=4, new_branch="again")
    first = RolloutLog(open_run(root).rollouts_path("again")).read_step(5)
    known = memory_at(root, 4).successes
    assert {group.prompt.prompt_id for group in first if group.injection_status == "injected"} <= known.keys()


def test_exgrpo_replays_the_response_of_least_entropy(replaying):
    session, memory = open_session_at(replaying, 8), memory_at(replaying, 8)
    prompt = session.task.prompt(next(iter(memory.successes)))
    (good, *_) = memory.successes[prompt.prompt_id]
    odd = replace(good, response_ids=tuple(reversed(good.response_ids)), text="odd")
    stored, known = {prompt.prompt_id: (odd, good)}, {prompt.prompt_id: prompt}
    assert select_successes(session, stored, known, seed=0) == {prompt.prompt_id: good}
    one = {prompt.prompt_id: (odd,)}
    assert select_successes(session, one, known, seed=0) == {prompt.prompt_id: odd}


def test_exgrpo_skips_retired_prompts_from_the_next_epoch(replaying):
    session = open_session_at(replaying, 8)
    size = len(session.task.train)
    first = session.task.train[session.order.indices(size, 1)[0]]
    retired = ReplayBuffer(is_collecting=True, retired_epochs={first.prompt_id: 0})
    (found, position) = draw_from_order(session, size, count=2, skips=skip_retired(session, retired))
    assert first not in [prompt for _, prompt in found]
    assert position == size + 3
    same_epoch = ReplayBuffer(is_collecting=True, retired_epochs={first.prompt_id: 1})
    assert draw_from_order(session, size, count=2, skips=skip_retired(session, same_epoch))[1] == size + 2
    everyone = ReplayBuffer(is_collecting=True, retired_epochs={prompt.prompt_id: 0 for prompt in session.task.train})
    skips = skip_retired(session, everyone)
    assert draw_from_order(session, size, count=2, skips=skips)[1] == size + 2, "a batch is never short"


def test_exgrpo_prompt_is_in_a_batch_once(replaying):
    session = open_session_at(replaying, 8)
    answer = Success(response_ids=(1, 2), behavior_logps=(-1.0, -1.0), text="1", step=0, reward=1.0)
    ahead = [session.task.train[index] for index in session.order.indices(0, 4)]
    memory = ReplayBuffer(
        is_collecting=True,
        successes={prompt.prompt_id: (answer,) for prompt in ahead},
        num_correct={prompt.prompt_id: 2 for prompt in ahead},
    )
    draw = build_replay_batch(session, memory, seed_name="main", step=1, position=0)
    names = [prompt.prompt_id for part in draw.prompt_batches for prompt in part.prompts]
    assert len(names) == len(set(names)) == 4


def test_exgrpo_with_a_guide_cache_is_refused(replaying, tmp_path):
    root = copy_run(replaying, tmp_path / "run")
    sample(root, source="4", at=2)
    with pytest.raises(NpoError, match=r"guide.experience.replay_fraction replays .* guide near fills the same slots"):
        resume(root, at=2, guide="near")
