"""Asynchronous sampling is exact: rollouts of step s come from the policy after step max(f, s - 1 - k), killed or not.

f is the step that the branch forks at, k is train.staleness. Producers are real processes.
"""

from pathlib import Path

import pytest
import torch

from npo_cli.autonpo.probe import read_sampled_groups
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import LogprobRequest
from npo_cli.session.session import Session, sample_groups
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.costs import read_cost_lines
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import ancestry, read_segments
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Group
from tests.helpers.autonpo_runs import (
    check_equal_except_main,
    events_of,
    start_autonpo,
    start_autonpo_resume,
    train_grpo,
)
from tests.helpers.runs import (
    LORA,
    copy_run,
    open_session_at,
    reproducible_digests,
    resume,
    sample,
    score,
    start_resume,
    stop_after,
    tiny_recipe,
    train,
)

pytestmark = pytest.mark.usefixtures("producers")

STALE = ("train.staleness=1", "train.num_steps=6")
KINDS = {
    "plain": (),
    "two steps": ("train.staleness=2",),
    "dynamic sampling": ("sampling.dynamic=true", "sampling.max_gen_batches=3"),
    "two updates": ("train.num_updates=2",),
    "behavior policy as old policy": ("loss.old_policy=behavior",),
    "lora": LORA,
    "evaluation": ("eval.every=2",),
    "dense target": (
        *("target.kind=distribution", "target.teacher=model:micro-base"),
        *("target.start_step=1", "target.num_steps=4", "target.group_size=2"),
    ),
    "token weights": ("target.kind=token_weight", "target.teacher=policy", "target.privileged=answer"),
}
FAST = ("plain",)


def groups_of(root: Path, step: int, branch: str = "main") -> tuple[Group, ...]:
    found = RolloutLog(open_run(root).rollouts_path(branch)).read_step(step)
    assert found is not None, f"step {step} is on record"
    return found


def sampler_steps(root: Path, branch: str = "main") -> dict[int, set[int | None]]:
    """Steps of the behavior policies of each recorded step's own rollouts."""
    log = RolloutLog(open_run(root).rollouts_path(branch))
    return {
        step: {rollout.sampler_step for group in log.read_step(step) for rollout in group.on_policy.rollouts}
        for step in log.steps()
    }


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_resume_with_staleness_is_bitwise_identical(tmp_path, kind):
    settings = (*STALE, *KINDS[kind])
    train(tmp_path / "straight", *settings)
    # Step 4 is the newest checkpoint, step 5 is trained.
    stop_after(train_run(tmp_path / "dropped", tiny_recipe(*settings)), 5)
    assert [report.step for report in resume(tmp_path / "dropped")] == [5, 6]
    straight = reproducible_digests(tmp_path / "straight")
    assert reproducible_digests(tmp_path / "dropped") == straight
    assert "checkpoints/step_000006/training_state/optimizer.safetensors" in straight


@pytest.mark.parametrize("staleness", [1, 2])
def test_staleness_is_that_of_every_rollout(tmp_path, staleness):
    reports = train(tmp_path / "run", f"train.staleness={staleness}", "train.num_steps=5")
    expected = {step: {max(0, step - 1 - staleness)} for step in range(1, 6 + staleness)}
    assert sampler_steps(tmp_path / "run") == expected
    found = [report.metrics["staleness"] for report in reports]
    assert found == [min(step - 1, staleness) for step in range(1, 6)]


def test_behavior_policy_is_the_checkpoint_that_the_record_names(tmp_path):
    """Step 4 with k = 1 is from step 2: the learner's engine samples the same tokens from that checkpoint."""
    root = tmp_path / "run"
    train(root, *STALE, "train.save_every=1", "train.num_steps=4", "train.lr=3e-3")
    recorded = groups_of(root, 4)
    session = open_session_at(root, 2)
    again = sample_again(session, recorded)
    assert [group.rollouts for group in again] == [group.rollouts for group in recorded]
    for group in recorded:
        requests = [
            LogprobRequest(prompt_ids=session.policy.encode(group.prompt), response_ids=rollout.response_ids)
            for rollout in group.rollouts
        ]
        recomputed = session.engine.compute_logps(requests)
        for rollout, logps in zip(group.rollouts, recomputed, strict=True):
            torch.testing.assert_close(torch.tensor(rollout.behavior_logps), torch.tensor(logps), atol=1e-5, rtol=0)
    newer = sample_again(open_session_at(root, 3), recorded)
    assert [group.rollouts for group in newer] != [group.rollouts for group in recorded]


def sample_again(session: Session, recorded: tuple[Group, ...]) -> list[Group]:
    return sample_groups(
        session,
        [group.prompt for group in recorded],
        seed_label=("main", 4, 0),
        slots=range(len(recorded[0].rollouts)),
        sampler_step=2,
    )


def test_staleness_trained_in_parts_and_longer_is_the_straight_run(tmp_path):
    train(tmp_path / "straight", *STALE, "train.num_steps=8")
    train(tmp_path / "parts", *STALE, "train.num_steps=5", until=3)
    resume(tmp_path / "parts")
    resume(tmp_path / "parts", "train.num_steps=8")
    straight, parts = (reproducible_digests(tmp_path / name) for name in ("straight", "parts"))
    assert {name: parts[name] for name in straight} == straight
    assert parts.keys() - straight.keys() == {
        f"checkpoints/step_00000{step}/{file}"
        for step in (3, 5)
        for file in ("model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json")
    }


def test_staleness_of_a_guided_fork_begins_at_the_fork(tmp_path):
    roots = [tmp_path / "straight", tmp_path / "dropped"]
    train(roots[0], *STALE)
    sample(roots[0], source="6")
    copy_run(roots[0], roots[1])
    options = {"at": 2, "guide": "near"}
    resume(roots[0], **options)
    assert sampler_steps(roots[0], "near") == {3: {2}, 4: {2}, 5: {3}, 6: {4}, 7: {5}}
    statuses = {group.injection_status for step in range(3, 7) for group in groups_of(roots[0], step, "near")}
    assert "injected" in statuses
    # Killed before the branch has a checkpoint: some of the steps that the fork's policy samples are on record.
    stop_after(start_resume(roots[1], **options), 3)
    resume(roots[1])
    assert reproducible_digests(roots[1], "near") == reproducible_digests(roots[0], "near")


def test_synchronous_training_starts_no_producer(tmp_path):
    train(tmp_path / "run", "train.num_steps=2")
    session = open_session_at(tmp_path / "run", 2)
    assert session.producer is None
    assert sampler_steps(tmp_path / "run") == {1: {0}, 2: {1}}


def test_dead_producer_ends_the_run(tmp_path):
    records = train_run(tmp_path / "run", tiny_recipe(*STALE))
    killed = False
    with pytest.raises(RunFailed, match=r"producer \(train.staleness=1\) was killed by SIGKILL"):
        for record in records:
            if getattr(record, "step", 0) == 1 and not killed:
                killed = True
                find_session(records).producer._process.kill()
    assert RunFailed.exit_code == 1
    resume(tmp_path / "run")
    train(tmp_path / "straight", *STALE)
    assert reproducible_digests(tmp_path / "run") == reproducible_digests(tmp_path / "straight")


def find_session(records) -> Session:
    return records.gi_frame.f_locals["session"]


def test_batches_sampled_ahead_are_charged_once(tmp_path):
    root = tmp_path / "run"
    train(root, *STALE, "train.num_steps=4")
    ahead = [line for line in read_cost_lines(open_run(root)) if line.kind == "ahead"]
    assert {line.step for line in ahead} == {3, 5}
    check_costs(root, trained=4, ahead=[5])
    resume(root, "train.num_steps=6")
    check_costs(root, trained=6, ahead=[7])


def check_costs(root: Path, *, trained: int, ahead: list[int]) -> None:
    """By the recorded responses: those of trained steps are the branch's, the others are abandoned so far."""
    tokens = {
        step: sum(len(rollout.response_ids) for group in groups_of(root, step) for rollout in group.rollouts)
        for step in sampler_steps(root)
    }
    assert tokens.keys() == {*range(1, trained + 1), *ahead}
    costs = compute_run_costs(open_run(root), "main")
    assert costs.training_tokens == sum(tokens[step] for step in range(1, trained + 1))
    assert costs.abandoned_tokens == sum(tokens[step] for step in ahead)


def test_dynamic_sampling_with_staleness_visits_the_data_in_order(tmp_path):
    """Step s begins where step s - 1 ended, however many batches of 4 prompts that took."""
    root = tmp_path / "run"
    reports = train(root, *STALE, *KINDS["dynamic sampling"], "train.num_steps=4", "train.lr=3e-3")
    session, position = open_session_at(root, 4), 0
    for report in reports:
        visited = [group.prompt.prompt_id for group in groups_of(root, report.step)]
        assert len(visited) == 4 * report.metrics["dynamic/batches"]
        indices = session.order.indices(position, len(visited))
        assert visited == [session.task.train[index].prompt_id for index in indices]
        position += len(visited)
        assert report.metrics["data_position"] == position
    assert max(report.metrics["dynamic/batches"] for report in reports) > 1


@pytest.mark.slow
def test_scoring_with_staleness_is_that_of_the_trained_steps(tmp_path):
    """Batches of steps 5 and 6, which were sampled ahead and not trained, take no part."""
    few = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50")
    root, cut = tmp_path / "run", tmp_path / "cut"
    train(root, "train.staleness=2")
    copy_run(root, cut)
    log = open_run(cut).rollouts_path("main")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for line in lines if not line.startswith((b'{"step":5,', b'{"step":6,'))))
    rewrite_head(log, is_accepted=True)
    assert sampler_steps(root).keys() - sampler_steps(cut).keys() == {5, 6}
    found = [score(folder, *few, at=2) for folder in (root, cut)]
    assert found[0] == found[1]
    assert [one.step for one in found[0]] == [4]


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_autonpo_with_staleness_begins_each_branch_with_an_empty_queue(tmp_path, staleness):
    """With k = 2, checkpoints every 2 steps and a fork at f, what the policy of f - 2 sampled is step f + 1 of the
    parent."""
    root, settings = tmp_path / "run", (f"train.staleness={staleness}",)
    list(start_autonpo(root, *settings))
    assert events_of(root).count("rolled_back") >= 1
    run = open_run(root)
    for segment in read_segments(run):
        found, fork = sampler_steps(root, segment.branch), segment.fork_step
        assert found == {step: {max(fork, step - 1 - staleness)} for step in found}
    newest = read_segments(run)[-1].branch
    session = open_session_at(root, 12, branch=newest)
    for span in ancestry(run, newest):
        for step in range(span.from_step + span.from_step % 2, (span.to_step or 12 - staleness), 2):
            sampled = read_sampled_groups(session, newest, step)
            assert {one.sampler_step for group in sampled for one in group.on_policy.rollouts} == {step}
    train_grpo(tmp_path / "plain", *settings)
    list(start_autonpo_resume(tmp_path / "plain"))
    check_equal_except_main(tmp_path / "plain", root)


def test_lost_record_of_the_queue_is_an_error(tmp_path):
    root = tmp_path / "run"
    train(root, *STALE, until=4)
    log = open_run(root).rollouts_path("main")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for line in lines if b'"step":5,' not in line))
    rewrite_head(log, is_accepted=True)
    with pytest.raises(NpoError, match="rollouts of step 5 of main are not on record"):
        resume(root)
