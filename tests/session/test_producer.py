"""The producer as a process: it ends with the learner, and the learner with it. Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import Sample
from npo_cli.policy.model import load_policy
from npo_cli.session import producer
from npo_cli.session.producer import (
    Producer,
    ProducerEngine,
    PublishedWeights,
    QueueEngine,
    compute_checksum,
    select_weights,
)
from npo_cli.session.producer_process import load_published
from tests.helpers.runs import TINY, reproducible_digests, resume, tiny_recipe, train
from tests.helpers.warm_process import num_lines, wait_until
from tests.inference.vllm_models import make_engine, make_requests, perturb_weights

LONG = (*TINY, "train.num_steps=500", "train.save_every=500", "train.staleness=1")
PATIENCE_SECONDS = 600.0


def find_children(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def started(tmp_path: Path):
    """`npo train` with a fresh producer, past its second step, in a process group of its own."""
    root, errors = tmp_path / "run", tmp_path / "err"
    command = [sys.executable, "-m", "npo_cli", "train", "micro", str(root), *LONG]
    with errors.open("w") as err, subprocess.Popen(command, stderr=err, start_new_session=True) as process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while num_lines(root / "branches" / "main" / "metrics.jsonl") < 2:
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.01)
        (child,) = find_children(process.pid)
        yield process, child, root, errors
        process.kill()


@pytest.mark.slow
def test_killed_producer_ends_the_run_with_a_message(started):
    process, child, _, errors = started
    os.kill(child, signal.SIGKILL)
    assert process.wait() == 1
    assert "the producer (train.staleness=1) was killed by SIGKILL" in errors.read_text()
    assert "npo resume" in errors.read_text()
    assert not find_children(process.pid)


@pytest.mark.slow
def test_producer_ends_with_a_killed_learner(started):
    process, child, _, _ = started
    process.kill()
    process.wait()
    wait_until(lambda: not is_running(child))


@pytest.mark.slow
def test_interrupt_saves_and_ends_both(started, tmp_path):
    """Ctrl-C reaches every process of the terminal's group."""
    process, child, root, errors = started
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130, errors.read_text()
    assert not is_running(child)
    (saved,) = [path for path in (root / "branches/main/checkpoints").iterdir() if path.name != "step_000000"]
    step = int(saved.name.removeprefix("step_"))
    # What the queue held is on record: the run is that which was never stopped.
    longer = (f"train.num_steps={step + 2}", "train.save_every=500", "train.staleness=1")
    resume(root, longer[0])
    train(tmp_path / "straight", *longer)
    straight, stopped = reproducible_digests(tmp_path / "straight"), reproducible_digests(root)
    assert {name: stopped[name] for name in straight} == straight


def test_output_of_a_producer_that_cannot_start_is_reported(tmp_path, monkeypatch):
    def start(channel, lifeline, output):
        return subprocess.Popen(
            [sys.executable, "-c", "raise SystemExit('no model here')"], stdout=output, stderr=output
        )

    monkeypatch.setattr(producer, "start_process", start)
    with pytest.raises(RunFailed, match="ended with exit code 1; its last output: no model here"):
        train(tmp_path / "run", "train.staleness=1")


@pytest.mark.usefixtures("producers")
def test_error_in_the_producer_is_raised_as_it_was(tmp_path):
    policy = load_policy(ModelSettings())
    started = Producer(tiny_recipe("train.staleness=1", "model.path=no/such/model"), check_rows=())
    started.start(policy)
    with pytest.raises(NpoError, match="no/such/model") as raised:
        started.wait_until_ready()
    assert raised.value.exit_code == 2
    assert raised.value.hint
    # It answers no other job: a later one, as of an evaluation, fails at once.
    again = ProducerEngine(started, policy)
    request = replace(make_requests(policy, "1+1=")[0], version=again.sync_weights(0))
    with pytest.raises(NpoError, match="no/such/model"):
        again.generate([request], temperature=1.0, max_new_tokens=6)
    started.close()


@pytest.mark.usefixtures("producers")
def test_engines_of_one_producer_sample_in_turn_each_from_its_own_weights():
    recipe = tiny_recipe("train.staleness=1")
    policy = load_policy(recipe.model)
    requests = make_requests(policy, "1+1=")
    started = Producer(recipe, check_rows=())
    started.start(policy)
    queue, own = QueueEngine(started, policy), ProducerEngine(started, policy)

    def sample(engine, version: str | None) -> list[Sample]:
        versioned = [replace(request, version=version) for request in requests]
        return engine.generate(versioned, temperature=1.0, max_new_tokens=6)

    def files() -> list[str]:
        return sorted(path.name for path in started._folder.glob("weights-*"))

    queue.publish(0)
    expected = [sample(make_engine("transformers", policy), None)]
    perturb_weights(policy, by=0.3)
    queue.publish(1)
    version = own.sync_weights(1)
    assert own.sync_weights(1) == version
    expected.append(sample(make_engine("transformers", policy), None))
    assert expected[0] != expected[1]
    # An evaluation between two jobs of a batch, which is older.
    found = [sample(queue, queue.sync_weights(0)), sample(own, version), sample(queue, queue.sync_weights(0))]
    assert found == [expected[0], expected[1], expected[0]]
    assert sample(queue, queue.sync_weights(1)) == expected[1]
    assert files() == ["weights-1.safetensors", "weights-2.safetensors", "weights-3.safetensors"]
    perturb_weights(policy, by=0.3, seed=1)
    queue.publish(2)
    assert files() == ["weights-2.safetensors", "weights-3.safetensors", "weights-4.safetensors"]
    folder = started._folder
    started.close()
    assert not folder.exists()


def test_damaged_weights_are_not_sampled_from(tmp_path):
    policy = load_policy(ModelSettings())
    sent = {name: tensor.detach() + 0.01 for name, tensor in select_weights(policy).items()}
    path = tmp_path / "weights.safetensors"
    save_file(sent, path)
    weights = PublishedWeights(step=3, version="step 3", path=path, crc32=compute_checksum(sent))
    own = select_weights(policy)
    load_published(own, weights)
    assert compute_checksum({name: tensor.detach() for name, tensor in own.items()}) == weights.crc32
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunFailed, match="the weights of step 3 did not reach the producer as they were sent"):
        load_published(own, weights)
