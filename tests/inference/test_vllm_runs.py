"""Whole runs with vLLM as the engine: the circle, a kill in mid-batch, a sync that goes wrong, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npo_cli.config.loading import recipe_from_dict
from npo_cli.errors import NpoError, RunFailed
from npo_cli.guides.online import OnlineExtrapolation, extrapolated_rollouts
from npo_cli.inference import vllm_common as vllm_engine
from npo_cli.policy.extrapolated import extrapolate_weights
from npo_cli.policy.model import Policy, load_policy
from npo_cli.session.session import build_session, open_policy, open_task, sample_groups
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Group, Rollout
from tests.helpers.runs import (
    LORA,
    TINY,
    open_session_at,
    reproducible_digests,
    resume,
    sample,
    score,
    tiny_recipe,
    train,
)

pytestmark = pytest.mark.vllm
VLLM = ("engine.kind=vllm",)
SERVED = ("engine.kind=vllm_server",)
LONGER = ("train.num_steps=10",)
"""So that nobody is done before the kill falls."""
NPO = [sys.executable, "-c", "from npo_cli.cli.main import main; main()"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm") / "run"
    train(root, *VLLM)
    return root


def test_vllm_run_workflow_records_the_weight_version(trained):
    assert [found.step for found in score(trained, "scoring.num_prompts=8", "scoring.samples_per_prompt=2")] == [2, 4]
    info = sample(trained)
    assert info.complete
    steps = resume(trained, at=2, guide="near")
    assert [report.step for report in steps] == [3, 4]
    for branch, step in (("main", 1), ("main", 4), ("near", 3)):
        groups = RolloutLog(open_run(trained).rollouts_path(branch)).read_step(step)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        assert {each.sampler_step for each in rollouts if each.source == "own"} == {step - 1}
        assert {each.sampler_step for each in rollouts if each.source == "guide"} <= {4}


def test_vllm_run_agrees_with_the_trainer_at_every_step(trained):
    rows = [json.loads(line) for line in (trained / "branches" / "main" / "metrics.jsonl").read_text().splitlines()]
    trained_rows = [row for row in rows if row["rows_trained"]]
    assert trained_rows
    assert all(row["mismatch/abs_log_w_p99"] < 1e-4 for row in trained_rows)
    assert all(row["mismatch/clipped_fraction"] == 0 for row in trained_rows)


@pytest.mark.slow
def test_vllm_server_run_equals_the_in_process_run(trained, tmp_path):
    train(tmp_path / "run", *SERVED)
    ours, theirs = (
        [json.loads(line) for line in (root / "branches" / "main" / "metrics.jsonl").read_text().splitlines()]
        for root in (trained, tmp_path / "run")
    )
    assert [row["reward"] for row in ours[:4]] == [row["reward"] for row in theirs]


def started(root: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [*NPO, "train", "micro", *TINY, *settings, "--run", str(root)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [VLLM, SERVED])
def test_vllm_run_resumes_after_kill_9(trained, tmp_path, engine):
    """The seeds of a batch are its own, and on a CPU vLLM keeps them."""
    straight = tmp_path / "straight"
    train(straight, *engine, *LONGER)
    root = tmp_path / "killed"
    process = started(root, *engine, *LONGER)
    metrics = root / "branches" / "main" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resume(root)
    assert reproducible_digests(root, "main") == reproducible_digests(straight, "main")


def test_vllm_run_stops_at_a_failed_weight_sync(tmp_path, monkeypatch):
    root = tmp_path / "run"
    sent = vllm_engine.named_tensors
    calls = []

    def loses_a_layer_later(model):
        calls.append(model)
        return {name: tensor for name, tensor in sent(model).items() if len(calls) < 3 or "layers.2" not in name}

    monkeypatch.setattr(vllm_engine, "named_tensors", loses_a_layer_later)
    with pytest.raises(RunFailed, match=r"do not match the engine's model: tensors missing: model\.layers\.2"):
        train(root, *VLLM)
    monkeypatch.setattr(vllm_engine, "named_tensors", sent)
    assert resume(root)[-1].step == 4


def test_vllm_session_that_cannot_open_leaves_no_engine(tmp_path):
    recipe = tiny_recipe("engine.kind=vllm")
    with pytest.raises(NpoError, match=r"engine\.vllm\.weight_transfer=nccl needs a GPU"):
        train(tmp_path / "run", "engine.kind=vllm_server", "engine.vllm.weight_transfer=nccl")
    task = open_task(recipe)
    policy = open_policy(recipe, task, None)
    session = build_session(None, recipe, task=task, policy=policy)
    session.close()
    with pytest.raises(RunFailed, match="vLLM is closed"):
        session.engine.generate([], temperature=1.0, max_new_tokens=1)
    task.close()


# The policy pushed in its weights: one more sync into the engine, and one out of it


EXTRAPOLATED = (
    *("guide.source=extrapolated", "extrapolation.space=weights", "extrapolation.k=2", "extrapolation.a=2.0"),
    *("guide.inject.max_accuracy=0.5", "train.save_every=1", "train.num_steps=6"),
)


def scored(policy: Policy, pairs: list[tuple[Group, Rollout]]) -> list[list[float]]:
    """By the trainer's pass, with the weights at hand."""
    rows = [policy.row(group.prompt, one.response_ids) for group, one in pairs]
    logps_NT = policy.score(rows, temperature=1.0, chunk_tokens=512).logps_NT.tolist()
    return [logps_T[: len(one.response_ids)] for logps_T, (_, one) in zip(logps_NT, pairs, strict=True)]


def furthest(pairs: list[tuple[Group, Rollout]], logps: list[list[float]]) -> float:
    """From what was recorded when they were sampled."""
    found = zip(pairs, logps, strict=True)
    return max(abs(a - b) for (_, one), rescored in found for a, b in zip(one.behavior_logps, rescored, strict=True))


JOINED = (*VLLM, *LORA, "model.lora.rank=8")
"""With their older copies they have rank 16, which is vLLM's next larger slot."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(VLLM, id="vllm"),
        pytest.param(SERVED, id="served", marks=pytest.mark.slow),
        pytest.param(JOINED, id="adapters", marks=pytest.mark.slow),
    ],
)
def extrapolated(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pushed") / "run"
    train(root, *request.param, *EXTRAPOLATED)
    return root


def test_vllm_run_restores_the_weights_after_extrapolation(extrapolated):
    """Each step asks the policy, then the pushed one, then learns; each swap was proved, or the run had ended."""
    run = open_run(extrapolated)
    settings = recipe_from_dict(run.read_recipe("main")).model
    for step in (3, 4, 5, 6):
        groups = RolloutLog(run.rollouts_path("main")).read_step(step)
        own = [(group, one) for group in groups for one in group.rollouts if not one.is_off_policy]
        theirs = [(group, one) for group in groups for one in extrapolated_rollouts(group)]
        assert theirs
        # the policy of step - 1, and its older copy of 2 steps before
        policy = load_policy(settings, run.checkpoint_folder("main", step - 1))
        assert furthest(own, scored(policy, own)) < 1e-4
        assert furthest(theirs, scored(policy, theirs)) > 0.05
        with extrapolate_weights(policy, run.checkpoint_folder("main", step - 3), strength=2.0):
            assert furthest(theirs, scored(policy, theirs)) < 1e-4
            assert furthest(own, scored(policy, own)) > 0.05


def test_vllm_run_resends_weights_after_extrapolation_without_update(extrapolated):
    """The same seeds before and after the pushed policy was asked, as a choice of k and a does it."""
    session = open_session_at(extrapolated, 4)
    ahead = OnlineExtrapolation(session=session, branch="main").open_sampler(4)
    prompts, slots = session.task.train[:4], range(2)
    before = sample_groups(session, prompts, seed_label=("t",), slots=slots, sampler_step=4)
    between = ahead.sample_groups(prompts, label=("t",), slots=slots)
    after = sample_groups(session, prompts, seed_label=("t",), slots=slots, sampler_step=4)
    session.close()
    session.task.close()
    assert after == before
    pairs = zip(between, before, strict=True)
    assert any(theirs.rollouts[0].behavior_logps != ours.rollouts[0].behavior_logps for theirs, ours in pairs)
