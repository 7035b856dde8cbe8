"""Asynchronous sampling by vLLM: the producer's engine holds the weights of step s - 1 - k, and is asked in turn.

Producers, servers and kills are real.
"""

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
from npo_cli.policy.model import load_policy
from npo_cli.storage.evals import read_evals
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.evaluate import evaluate_run
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import StepReport
from tests.helpers.runs import LORA, TINY, copy_run, reproducible_digests, resume, stop_after, tiny_recipe, train
from tests.inference.test_process_supervisor import lives, wait_for
from tests.inference.test_vllm_runs import furthest, scored
from tests.inference.test_vllm_server import descendants

pytestmark = pytest.mark.vllm
LOCAL = ("engine.kind=vllm",)
SERVED = ("engine.kind=vllm_server",)
STALE = ("train.staleness=1", "train.num_steps=6", "train.save_every=1", "train.lr=3e-3", "eval.every=2")
ENGINES = [
    pytest.param(LOCAL, id="vllm"),
    pytest.param(SERVED, id="served", marks=pytest.mark.slow),
    pytest.param((*SERVED, *LORA), id="served adapters", marks=pytest.mark.slow),
]
NPO = [sys.executable, "-c", "from npo_cli.cli.main import main; main()"]


@pytest.fixture(scope="module", params=ENGINES)
def trained(request, tmp_path_factory) -> Path:
    """Six steps with evaluations in between, which the producer samples too."""
    root = tmp_path_factory.mktemp("stale") / "run"
    train(root, *request.param, *STALE)
    return root


def test_vllm_producer_samples_from_the_policy_that_the_record_names(trained):
    run = open_run(trained)
    settings = recipe_from_dict(run.read_recipe("main")).model
    for step in range(1, 8):
        groups = RolloutLog(run.rollouts_path("main")).read_step(step)
        pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
        sampler_step = max(0, step - 2)
        assert {rollout.sampler_step for _, rollout in pairs} == {sampler_step}
        policy = load_policy(settings, run.checkpoint_folder("main", sampler_step))
        assert furthest(pairs, scored(policy, pairs)) < 1e-4
        if step in (4, 6):  # some steps have nothing to learn from
            later = load_policy(settings, run.checkpoint_folder("main", sampler_step + 2))
            assert furthest(pairs, scored(later, pairs)) > 1e-3


def test_evaluation_through_the_producer_is_that_of_the_checkpoint(trained, tmp_path):
    """A session that does not train opens its own engine."""
    root = copy_run(trained, tmp_path / "run")
    recorded = {report.step: report for report in read_evals(open_run(root))}
    assert recorded.keys() == {0, 2, 4, 6}
    for name in ("evals.jsonl", "prompt_results.jsonl"):
        for path in root.glob(f"{name}*"):
            path.unlink()
    for step, before in recorded.items():
        *_, report = evaluate_run(root, step=step, every_step=False, branch=None, overrides=())
        assert (report.accuracy, report.num_tokens) == (before.accuracy, before.num_tokens)


@pytest.mark.slow
def test_stale_vllm_run_resumes_bitwise(trained, tmp_path):
    """Step 4 is the newest checkpoint, step 5 is trained."""
    recipe = recipe_from_dict(open_run(trained).read_recipe("main"))
    stop_after(train_run(tmp_path / "dropped", recipe), 5)
    resume(tmp_path / "dropped")
    assert reproducible_digests(tmp_path / "dropped") == reproducible_digests(trained)


def test_device_of_an_in_process_producer_is_refused(tmp_path):
    with pytest.raises(NpoError, match=r"engine\.producer\.device=cpu is not available with engine\.kind=vllm"):
        train(tmp_path / "run", *LOCAL, "train.staleness=1", "engine.producer.device=cpu")
    assert not (tmp_path / "run").exists()


def test_producer_whose_server_cannot_start_is_one_error(tmp_path):
    settings = (*SERVED, "train.staleness=1", "engine.vllm.start_timeout=0.1")
    before = descendants(os.getpid())
    with pytest.raises(RunFailed, match=r"did not start within engine\.vllm\.start_timeout = 0\.1 s"):
        train(tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()
    assert wait_for(lambda: not any(map(lives, set(descendants(os.getpid())) - set(before))))


@pytest.mark.slow
def test_killed_server_of_a_producer_ends_the_run_and_resume_continues(tmp_path):
    settings = (*SERVED, *STALE)
    before = set(descendants(os.getpid()))
    records = train_run(tmp_path / "run", tiny_recipe(*settings))
    with pytest.raises(RunFailed, match="the vLLM server failed") as failed:
        for record in records:
            if isinstance(record, StepReport) and record.step == 2:
                family = set(descendants(os.getpid())) - before
                for pid in [pid for pid in family if is_server(pid)]:
                    os.kill(pid, signal.SIGKILL)
    assert "npo resume" in failed.value.hint
    assert wait_for(lambda: not any(map(lives, family)), seconds=30)
    resume(tmp_path / "run")
    train(tmp_path / "straight", *settings)
    assert reproducible_digests(tmp_path / "run") == reproducible_digests(tmp_path / "straight")


def is_server(pid: int) -> bool:
    """Not its supervisor, whose command line has the server's in it."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"vllm.entrypoints.openai.api_server" in words and b"npo_cli.inference.process" not in words


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", [LOCAL, SERVED], ids=["vllm", "served"])
def test_stale_vllm_run_killed_with_kill_9_leaves_nothing_and_resumes_bitwise(tmp_path, engine):
    settings = (*engine, "train.staleness=2", "train.num_steps=12", "train.save_every=3", "eval.every=4")
    train(tmp_path / "straight", *settings)
    root, kills = tmp_path / "killed", 0
    for after in (2, 5, 10):
        command = ["resume", str(root)] if root.exists() else ["train", "micro", *TINY, *settings, "--run", str(root)]
        process = subprocess.Popen([*NPO, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_steps(root, after, process)
        family = descendants(process.pid)
        kills += process.poll() is None
        process.kill()
        process.wait()
        assert wait_for(lambda pids=family: not any(map(lives, pids)), seconds=30)
    assert kills == 3
    resume(root)
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")


def wait_for_steps(root: Path, num: int, process: subprocess.Popen) -> None:
    metrics = root / "branches" / "main" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and any(json.loads(line)["step"] >= num for line in whole_lines(metrics))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)


def whole_lines(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].splitlines()
