"""Guide caches that a replay fills: which prompts are sampled, what they get, what it costs, resume after a kill."""

import json
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.costs import read_cost_lines
from npo_cli.storage.guide_cache import list_guide_caches, read_guide_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Group
from tests.helpers.runs import (
    copy_run,
    reproducible_digests,
    resume,
    sample,
    start_resume,
    stop_after,
    train,
    trajectories,
)

LAZY = ("guide.cache.lazy=true",)
GATED = ("guide.inject.max_accuracy=0.25",)
"""Of four responses at most one is correct."""
ALL_WRONG = ("guide.inject.max_accuracy=0",)
STEPS = range(3, 7)


@pytest.fixture(scope="module")
def learner(tmp_path_factory) -> Path:
    """A run of 6 steps over a pool of 8 prompts, 4 a step, with a cache `near` of step 6 that a replay from 2 fills."""
    root = tmp_path_factory.mktemp("lazy") / "run"
    train(root, "train.num_steps=6", "task.pool_size=8", "task.kind=mix3")
    info = sample(root, *LAZY, source="6")
    assert (info.num_prompts, info.num_samples, info.complete) == (0, 0, True)
    return root


@pytest.fixture(scope="module")
def replayed(learner, tmp_path_factory) -> Path:
    """Every prompt is visited twice in steps 3 to 6."""
    root = copy_run(learner, tmp_path_factory.mktemp("replayed") / "run")
    resume(root, *GATED, at=2, guide="near")
    return root


def groups_of(root: Path, branch: str = "near") -> list[Group]:
    log = RolloutLog(open_run(root).rollouts_path(branch))
    return [group for step in STEPS for group in log.read_step(step)]


def test_lazy_guide_is_sampled_for_the_groups_that_pass_the_gate_and_once_per_prompt(replayed):
    groups = groups_of(replayed)
    eligible = [group.prompt.prompt_id for group in groups if group.on_policy_accuracy <= 0.25]
    store = open_run(replayed).guide_folder("near")
    chunks = [json.loads(line)["groups"] for line in (store / "rollouts.jsonl").read_text().splitlines()]
    sampled = [samples["prompt_id"] for chunk in chunks for samples in chunk]
    # In the order of first visits that passed; some prompt passed again, and some never did.
    assert sampled == list(dict.fromkeys(eligible)) != eligible
    assert set(sampled) < {group.prompt.prompt_id for group in groups}
    kept = trajectories(replayed)
    for group in groups:
        passed, guide = group.on_policy_accuracy <= 0.25, kept.get(group.prompt.prompt_id)
        injected = [rollout.response_ids for rollout in group.rollouts if rollout.is_off_policy]
        assert injected == ([guide.response_ids] if passed and guide else [])
        assert group.injection_status == ("gate_closed" if not passed else "injected" if guide else "no_guide")
    assert {group.injection_status for group in groups} >= {"gate_closed", "injected"}
    (info,) = list_guide_caches(open_run(replayed))
    assert (info.num_prompts, info.num_rollouts) == (len(sampled), len(kept))


def test_lazy_guide_has_the_responses_of_a_cache_that_was_filled_before(learner, replayed, tmp_path):
    root = copy_run(learner, tmp_path / "run")
    sample(root, source="6", name="eager")
    lazy, eager = trajectories(replayed), trajectories(root, "eager")
    assert lazy and {prompt_id: eager.get(prompt_id) for prompt_id in lazy} == lazy


@pytest.mark.parametrize("gate", ["0.25", "1"])
def test_lazy_guide_replay_killed_and_resumed_is_bitwise_identical(gate, learner, replayed, tmp_path):
    """The kill comes after the guide's samples of step 3, the first, and before the groups of the step are written."""
    settings = (f"guide.inject.max_accuracy={gate}",)
    straight = replayed if settings == GATED else copy_run(learner, tmp_path / "straight")
    if straight is not replayed:
        resume(straight, *settings, at=2, guide="near")
    root = copy_run(learner, tmp_path / "run")
    stop_after(start_resume(root, *settings, at=2, guide="near"), 3)
    assert trajectories(root)
    open_run(root).rollouts_path("near").unlink()
    # A killed process leaves the counts as they were.
    info = Path("guides/near/guide.json")
    (root / info).write_bytes((learner / info).read_bytes())
    resume(root)
    assert reproducible_digests(root, "near") == reproducible_digests(straight, "near")
    for name in (info, info.with_name("rollouts.jsonl")):
        assert (root / name).read_bytes() == (straight / name).read_bytes()
    ended, expected = (cost_at(open_run(one), "near", 6) for one in (root, straight))
    # The scout's 6 updates and the replay's 4.
    assert (ended.tokens, ended.forwards, ended.updates) == (expected.tokens, expected.forwards, 10)


def test_lazy_guide_costs_its_tokens_once_and_its_seconds_in_the_steps(replayed):
    run = open_run(replayed)
    sampled = sum(samples.num_tokens for samples in read_guide_prompts(run.guide_folder("near")).values())
    lines = [line for line in read_cost_lines(run) if line.kind == "guide_cache"]
    assert sum(line.tokens for line in lines) == sampled > 0
    assert {(line.branch, line.step, line.artifact, line.seconds) for line in lines} == {
        ("main", 2, "guides/near", 0.0)
    }
    trained = sum(line.tokens for line in read_cost_lines(run) if line.kind == "train")
    # The scout's 6 steps, the replay's 4, and the guide's samples.
    assert cost_at(run, "near", 6).tokens == trained + sampled


def test_lazy_guide_of_changed_weights_is_refused(learner, tmp_path):
    root = copy_run(learner, tmp_path / "run")
    path = open_run(root).guide_folder("near") / "guide.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"guide_digest": "0" * 64}))
    with pytest.raises(NpoError, match="guide_digest"):
        resume(root, *GATED, at=2, guide="near")


@pytest.fixture(scope="module")
def onward(learner, tmp_path_factory) -> Path:
    """From the newest step, 6, on: the policy extrapolated from two steps back is asked for all-wrong groups."""
    root = copy_run(learner, tmp_path_factory.mktemp("onward") / "run")
    sample(root, *LAZY, *ALL_WRONG, source="extrapolated:weights,k=2,a=1", at=6, name="ahead", steps=3)
    resume(root, *ALL_WRONG, "train.num_steps=9", at=6, guide="ahead")
    return root


def test_lazy_guide_without_a_rollback_is_asked_for_all_wrong_groups_alone(onward):
    log = RolloutLog(open_run(onward).rollouts_path("ahead"))
    groups = [group for step in (7, 8, 9) for group in log.read_step(step)]
    wrong = {group.prompt.prompt_id for group in groups if group.on_policy.num_correct == 0}
    asked = read_guide_prompts(open_run(onward).guide_folder("ahead"))
    assert set(asked) == wrong < {group.prompt.prompt_id for group in groups}
    for group in groups:
        kept = asked[group.prompt.prompt_id].rollouts if group.prompt.prompt_id in wrong else ()
        expected = "injected" if kept else "no_guide"
        assert group.injection_status == (expected if group.on_policy.num_correct == 0 else "gate_closed")
    # Nothing is thrown away: main's 6 steps, 3 more, and the guide's samples.
    cost = cost_at(open_run(onward), "ahead", 9)
    lines = list(read_cost_lines(open_run(onward)))
    assert cost.steps == 9
    assert cost.tokens == sum(line.tokens for line in lines if line.kind in ("train", "guide_cache"))


@pytest.mark.slow
def test_lazy_guide_without_a_rollback_killed_and_resumed_is_bitwise_identical(learner, onward, tmp_path):
    root = copy_run(learner, tmp_path / "run")
    sample(root, *LAZY, *ALL_WRONG, source="extrapolated:weights,k=2,a=1", at=6, name="ahead", steps=3)
    stop_after(start_resume(root, *ALL_WRONG, "train.num_steps=9", at=6, guide="ahead"), 7)
    resume(root)
    assert reproducible_digests(root, "ahead") == reproducible_digests(onward, "ahead")
