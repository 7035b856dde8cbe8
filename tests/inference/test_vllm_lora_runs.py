"""Whole runs that train adapters with vLLM: the circle, and candidates asked together, not one after the other."""

import json
import shutil
from pathlib import Path

import pytest

from npo_cli.storage.layout import open_run
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import list_sample_stores
from npo_cli.types.rollouts import Rollout
from tests.helpers.runs import LORA, copy_run, resume, sample, score, train

pytestmark = pytest.mark.vllm
SETTINGS = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "guide.inject.max_accuracy=1.0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Six steps with a checkpoint each, sampled by vLLM."""
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("adapters") / "run"
    train(root, *LORA, "engine.kind=vllm", "train.num_steps=6", "train.save_every=1", "task.kind=any")
    return root


def samples(root: Path) -> dict[tuple, Rollout]:
    (store,) = list_sample_stores(root / "scores")
    return {(*key, rollout.slot): rollout for key, found in store.read().items() for rollout in found.rollouts}


def test_vllm_lora_run_agrees_with_the_trainer(trained):
    rows = [json.loads(line) for line in (trained / "branches/main/metrics.jsonl").read_text().splitlines()]
    moved = [row for row in rows if row["rows_trained"]]
    assert len(moved) >= 3
    assert all(row["mismatch/abs_log_w_p99"] < 1e-4 for row in moved)
    groups = RolloutLog(open_run(trained).rollouts_path("main")).read_step(6)
    assert {rollout.sampler_step for group in groups for rollout in group.rollouts} == {5}


@pytest.mark.slow
def test_vllm_lora_scores_candidates_together_as_one_by_one(trained, tmp_path):
    found = {}
    # five candidates: all at once, in runs of two, one by one
    for places in (8, 2, 1):
        root = copy_run(trained, tmp_path / str(places))
        scores = score(root, *SETTINGS, f"engine.vllm.max_loras={places}", at=1)
        found[places] = (scores, samples(root))
    assert [one.step for one in found[8][0]] == [2, 3, 4, 5, 6]
    for places in (2, 1):
        assert found[places][1].keys() == found[8][1].keys()
        for key, row in found[8][1].items():
            assert found[places][1][key].response_ids == row.response_ids
            assert found[places][1][key].behavior_logps == pytest.approx(row.behavior_logps, abs=1e-5)
        for one, other in zip(found[places][0], found[8][0], strict=True):
            assert (one.quality, one.is_selected) == (other.quality, other.is_selected)
            assert one.signal == pytest.approx(other.signal, rel=1e-4)


@pytest.mark.slow
def test_vllm_lora_scoring_resumes_after_an_interruption(trained, tmp_path):
    straight, broken = (copy_run(trained, tmp_path / name) for name in ("straight", "broken"))
    score(straight, *SETTINGS, at=1)
    shutil.copytree(straight / "scores", broken / "scores")
    (samples_path,) = broken.glob("scores/*/rollouts.jsonl")
    (broken / samples_path.parent / "scores.json").unlink()
    lines = samples_path.read_bytes().splitlines(keepends=True)
    samples_path.write_bytes(b"".join(lines[: 2 * len(lines) // 3]))
    rewrite_head(samples_path)
    again = score(broken, *SETTINGS, at=1)
    assert samples(broken).keys() == samples(straight).keys()
    assert [one.quality for one in again] == [one.quality for one in score(straight, *SETTINGS, at=1)]


def test_vllm_lora_guide_cache_is_used_in_a_fork(trained, tmp_path):
    root = copy_run(trained, tmp_path / "run")
    assert sample(root, source="6", at=1).complete
    assert [report.step for report in resume(root, at=1, guide="near")] == [2, 3, 4, 5, 6]
