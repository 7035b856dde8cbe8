"""Guide caches from the run's own past: what it got right, as it was recorded."""

from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from tests.helpers.runs import copy_run, resume, sample, train, trajectories

NAMED = {"name": "given"}
CONTRACT_SPECS = {"past": "past"}
"""What `test_source_contract.py` opens."""


@pytest.fixture(scope="module")
def run_of_two_epochs(tmp_path_factory):
    """8 steps that see a pool of 16 twice: steps 5 to 8 meet what steps 1 to 4 answered."""
    root = tmp_path_factory.mktemp("veteran") / "run"
    train(root, "train.num_steps=8")
    return root


def recorded(root: Path, steps: range) -> dict[str, list]:
    log = RolloutLog(open_run(root).rollouts_path("main"))
    found: dict[str, list] = {}
    for step in steps:
        for group in log.read_step(step):
            found.setdefault(group.prompt.prompt_id, []).extend((step, rollout) for rollout in group.rollouts)
    return found


def test_past_source_has_correct_rollouts_with_recorded_log_probabilities(run_of_two_epochs, tmp_path):
    root = copy_run(run_of_two_epochs, tmp_path / "run")
    info = sample(root, source="past", at=4, **NAMED)
    history, found = recorded(root, range(1, 5)), trajectories(root, "given")
    solved = {
        prompt_id
        for prompt_id, each in history.items()
        if any(rollout.verdict == "correct" and rollout.finished for _, rollout in each)
    }
    samples = load_guide(open_run(root), "given")[1]
    assert found.keys() == solved
    assert solved
    for prompt_id, kept in found.items():
        same = [(step, rollout) for step, rollout in history[prompt_id] if rollout.response_ids == kept.response_ids]
        step, rollout = max(same, key=lambda pair: pair[0])
        assert (kept.source, kept.sampler_step) == ("past", rollout.sampler_step)
        assert rollout.sampler_step == step - 1
        newest = [rollout.behavior_logps for at, rollout in same if at == step]
        assert kept.behavior_logps in newest
        assert samples[prompt_id].num_sampled == len(history[prompt_id]) == 4
    assert (info.num_tokens, info.external_tokens, info.has_logps, info.source.text) == (0, 0, True, "past")
    # each of the 16 prompts was visited once in steps 1 to 4
    assert info.num_samples == 16 * 4


def test_past_source_replay_uses_recorded_behavior_log_probabilities(run_of_two_epochs, tmp_path):
    root = copy_run(run_of_two_epochs, tmp_path / "run")
    sample(root, source="past", at=4, **NAMED)
    reports = resume(root, "guide.inject.ratio=exact", "guide.inject.max_accuracy=1", at=4, guide="given")
    assert sum(report.metrics["inject/slots"] for report in reports) == len(trajectories(root, "given"))
    assert len(reports) == 4


def test_past_source_keeps_the_newest_of_equal_responses(tmp_path):
    root = tmp_path / "run"
    train(root, "train.num_steps=12", "task.pool_size=4", "train.save_every=4")
    sample(
        root, "guide.cache.max_responses_per_prompt=8", "guide.cache.samples_per_prompt=8", source="past", at=8, **NAMED
    )
    history = recorded(root, range(1, 9))
    for prompt_id, samples in load_guide(open_run(root), "given")[1].items():
        texts = [kept.text for kept in samples.rollouts]
        assert len(texts) == len(set(texts))
        right = [rollout for _, rollout in history[prompt_id] if rollout.verdict == "correct"]
        assert samples.num_correct == len(right)
        for kept in samples.rollouts:
            assert kept.sampler_step == max(each.sampler_step for each in right if each.text == kept.text)


def test_past_source_without_recorded_rollouts_is_refused(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    with pytest.raises(NpoError, match="the learner at step 0 has no earlier rollouts"):
        sample(root, source="past", at=0, **NAMED)
    with pytest.raises(NpoError, match=r"none of the 8 prompts of steps 3-4 was solved in steps 1-2"):
        sample(root, source="past", at=2, **NAMED)
