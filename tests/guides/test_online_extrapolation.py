"""Training with an extrapolated policy as online guide: which groups get it, what it costs, resume after a kill."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from npo_cli.errors import NpoError
from npo_cli.guides.online import extrapolated_rollouts
from npo_cli.guides.sources.extrapolated import Extrapolation, find_older_checkpoint, load_older_policy
from npo_cli.storage.checkpoints import list_checkpoints
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Group
from tests.helpers.runs import (
    LORA,
    copy_run,
    file_digests,
    open_session_at,
    reproducible_digests,
    resume,
    sample,
    stop_after,
    tiny_recipe,
    train,
)

INJECT = (
    *("guide.source=extrapolated", "extrapolation.k=2", "guide.inject.ratio=proximal", "train.num_steps=6"),
    *("task.kind=mix3", "guide.inject.max_accuracy=0.25"),
)
SAMPLE = (*INJECT, "extrapolation.mode=sample", "extrapolation.slots=1")


@pytest.fixture(scope="module")
def injected(tmp_path_factory) -> Path:
    """Two samples of the extrapolated policy for each group with at most one correct response in four."""
    root = tmp_path_factory.mktemp("injected") / "run"
    train(root, *INJECT)
    return root


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Path:
    """The last of four slots of such a group sampled from the extrapolated policy."""
    root = tmp_path_factory.mktemp("sampled") / "run"
    train(root, *SAMPLE)
    return root


def groups_at(root: Path, step: int, branch: str = "main") -> tuple[Group, ...]:
    return RolloutLog(open_run(root).rollouts_path(branch)).read_step(step)


def metrics_of(root: Path, branch: str = "main") -> list[dict]:
    return [json.loads(line) for line in open_run(root).metrics_path(branch).read_text().splitlines()]


def num_correct(group: Group) -> int:
    return sum(one.verdict == "correct" for one in group.rollouts if not one.is_off_policy)


def test_online_extrapolation_starts_when_the_run_is_k_steps_old(injected, sampled):
    for root in (injected, sampled):
        for row in metrics_of(root):
            # the policy of step 3 has made 2 steps
            assert ("extrapolate/groups" in row) == (row["step"] >= 3)
        assert all(group.injection_status == "off" and not extrapolated_rollouts(group) for group in groups_at(root, 2))


def test_online_extrapolation_injects_a_correct_response_into_failed_groups_only(injected):
    groups = [group for step in range(3, 7) for group in groups_at(injected, step)]
    for group in groups:
        responses = extrapolated_rollouts(group)
        if num_correct(group) > 1:
            assert (group.injection_status, responses) == ("gate_closed", ())
            continue
        assert len(responses) == 2
        off_policy = [one for one in group.rollouts if one.is_off_policy]
        solved = [one for one in responses if one.verdict == "correct" and one.finished]
        assert [one.slot for one in off_policy] == [3] * bool(solved)
        assert group.injection_status == ("injected" if solved else "no_guide")
        assert all(one in solved for one in off_policy)
    assert {group.injection_status for group in groups} == {"gate_closed", "injected", "no_guide"}


def test_sample_mode_keeps_correct_and_wrong_responses_at_no_extra_token(sampled):
    groups = [group for step in range(3, 7) for group in groups_at(sampled, step)]
    for group in groups:
        assert [one.slot for one in group.rollouts] == [0, 1, 2, 3]
        first = sum(one.verdict == "correct" for one in group.rollouts[:3])
        # of three own responses: 1/3 is above the gate of 1/4
        assert group.rollouts[3].source == ("extrapolated" if first == 0 else "own")
        assert group.unused_guide_rollouts == ()
    assert {group.rollouts[3].verdict for group in groups if group.injection_status == "injected"} >= {"wrong"}


def test_online_extrapolation_cost_counts_every_token_and_forward_pass(injected):
    for row in metrics_of(injected)[2:]:
        groups = groups_at(injected, row["step"])
        own = sum(len(one.response_ids) for group in groups for one in group.rollouts if one.source == "own")
        extrapolated = sum(len(one.response_ids) for group in groups for one in extrapolated_rollouts(group))
        assert (row["tokens"], row["extrapolate/tokens"]) == (own + extrapolated, extrapolated)
        # two models read each of their tokens
        assert row["forwards"] == own + 2 * extrapolated
    spent = cost_at(open_run(injected), "main", 6)
    rows = metrics_of(injected)
    assert spent.tokens == sum(row["tokens"] for row in rows)
    assert spent.forwards == sum(row.get("forwards", row["tokens"]) for row in rows) > spent.tokens


@pytest.mark.parametrize(
    ("settings", "fixture", "step"),
    [
        pytest.param(INJECT, "injected", 1, marks=pytest.mark.slow),
        (INJECT, "injected", 3),
        (SAMPLE, "sampled", 4),
    ],
    ids=["inject-1", "inject-3", "sample-4"],
)
def test_online_extrapolation_resumed_is_bitwise_identical(settings, fixture, step, tmp_path, request):
    """After 1 there is no older checkpoint yet; 3 is recorded and not saved; after 4 checkpoint 2 is read again."""
    root = tmp_path / "run"
    stop_after(train_run(root, tiny_recipe(*settings)), step)
    resume(root)
    assert reproducible_digests(root) == reproducible_digests(request.getfixturevalue(fixture))


@pytest.fixture(scope="module", params=["logits", "weights"])
def adapted(request, tmp_path_factory) -> Path:
    """Only adapters are trained and extrapolated."""
    root = tmp_path_factory.mktemp("adapted") / "run"
    train(root, *INJECT, *LORA, f"extrapolation.space={request.param}")
    assert any(extrapolated_rollouts(group) for group in groups_at(root, 6))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4])
def test_online_extrapolation_of_adapters_resumed_is_bitwise_identical(adapted, step, tmp_path):
    """3 is recorded and not saved; after 4 the older adapter of step 2 is read again."""
    root = tmp_path / "run"
    space = open_run(adapted).read_recipe("main")["extrapolation"]["space"]
    stop_after(train_run(root, tiny_recipe(*INJECT, *LORA, f"extrapolation.space={space}")), step)
    resume(root)
    ours, theirs = reproducible_digests(root), reproducible_digests(adapted)
    assert any(name.endswith("adapter_model.safetensors") for name in theirs)
    assert ours == theirs


def test_older_policy_of_adapters_shares_the_base_weights_only(adapted):
    session = open_session_at(adapted, 6)
    found = find_older_checkpoint(session.run, "main", k=2, step=6, every=2)
    extrapolation = Extrapolation(space="logits", k=2, a=1.0, step=6, older_checkpoint=found)
    older = load_older_policy(session, extrapolation)
    assert older is not None
    theirs, ours = (dict(policy.model.named_parameters()) for policy in (older, session.policy))
    adapters = {name for name in ours if ".lora_" in name}
    assert theirs.keys() == ours.keys() and 0 < len(adapters) < len(ours)
    for name in ours:
        # a frozen tensor is in memory once
        assert (theirs[name].data_ptr() == ours[name].data_ptr()) == (name not in adapters)
    # the adapters are those of steps 4 and 6, and an update of the learner leaves the older ones unchanged
    assert older.digest == open_session_at(adapted, 4).policy.digest != session.policy.digest
    before = older.digest
    with torch.no_grad():
        for name in adapters:
            ours[name].add_(1.0)
    session.policy.mark_weights_changed()
    assert older.digest == before


def test_online_extrapolation_killed_and_resumed_is_bitwise_identical(injected, tmp_path):
    root = tmp_path / "run"
    child = os.fork()
    if child == 0:
        for record in train_run(root, tiny_recipe(*INJECT)):
            if getattr(record, "step", 0) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [report.step for report in resume(root)] == [5, 6]
    assert reproducible_digests(root) == reproducible_digests(injected)


def test_older_checkpoint_is_a_planned_one(injected, tmp_path):
    """The checkpoint of step 3, saved only because the run stopped there, is not used."""
    root = tmp_path / "run"
    train(root, *INJECT, until=3)
    resume(root)
    kept, whole = reproducible_digests(root), reproducible_digests(injected)
    assert {name: kept[name] for name in whole} == whole


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), LORA], ids=["weights", "adapters"])
def test_extrapolated_weights_do_not_change_the_trained_weights(lora, tmp_path):
    """With max_new_tokens=2 no response is correct and none is injected: it trains as plain GRPO, bit for bit."""
    plain, extrapolated = tmp_path / "plain", tmp_path / "extrapolated"
    settings = (*lora, "train.num_steps=6", "sampling.max_new_tokens=2")
    train(plain, *settings)
    train(extrapolated, *INJECT, *settings, "extrapolation.space=weights")
    groups = [group for step in range(3, 7) for group in groups_at(extrapolated, step)]
    assert sum(len(extrapolated_rollouts(group)) for group in groups) == 2 * len(groups)
    ours, theirs = reproducible_digests(extrapolated), reproducible_digests(plain)
    weights = [name for name in theirs if name.endswith("model.safetensors")]
    assert [ours[name] for name in weights] == [theirs[name] for name in weights]


def test_replay_uses_the_guide_cache_and_then_online_extrapolation(injected, tmp_path):
    root = copy_run(injected, tmp_path / "run")
    sample(root, "guide.inject.max_accuracy=1.0", source="4", at=2)
    resume(root, "guide.inject.max_accuracy=1.0", at=2, guide="near", new_branch="guided")
    sources = {
        step: {one.source for group in groups_at(root, step, "guided") for one in group.rollouts} for step in (3, 5)
    }
    assert "extrapolated" not in sources[3] and "guide" in sources[3]
    assert "guide" not in sources[5] and "extrapolated" in sources[5]


def test_resume_without_the_older_checkpoint_is_refused(injected, tmp_path):
    root = copy_run(injected, tmp_path / "run")
    shutil.rmtree(open_run(root).checkpoint_folder("main", 2))
    before = file_digests(root)
    # of the checkpoints for k = 2 at step 4 only step 0 is left, which is 2 k back
    with pytest.raises(NpoError, match=r"no checkpoint of main in steps 1 to 2"):
        resume(root, at=4, new_branch="again")
    assert file_digests(root) == before
    assert [report.step for report in resume(root, "extrapolation.k=3", at=4, new_branch="again")] == [5, 6]
    assert metrics_of(root, "again")[0]["extrapolate/lag"] == 4


@pytest.mark.slow
def test_retention_keeps_the_older_checkpoint(tmp_path):
    root = tmp_path / "run"
    quotas = ("train.save_every=1", "train.keep_full_checkpoints=1", "train.keep_weights_only=1", "extrapolation.k=3")
    train(root, *INJECT, *quotas, "train.num_steps=8")
    assert metrics_of(root)[-1]["extrapolate/lag"] == 3
    # 0 always; 5 to 8, 3 steps back and one save more; 4 is the one guide of the quota
    assert [found.step for found in list_checkpoints(open_run(root), "main")] == [0, 4, 5, 6, 7, 8]
    assert [report.step for report in resume(root, "train.num_steps=9")] == [9]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("train.save_every=3", "train.save_every must be at most that, got 3"),
        ("guide.experience.replay_fraction=0.5", "use the same slots"),
    ],
)
def test_extrapolation_settings_that_conflict_are_refused(setting, why):
    with pytest.raises(NpoError, match=why):
        tiny_recipe(*INJECT, setting)


def test_extrapolation_slots_below_group_size_are_required():
    with pytest.raises(NpoError, match=r"extrapolation\.slots must be below train\.group_size"):
        tiny_recipe(*SAMPLE, "extrapolation.slots=4")
