"""vLLM in a process of its own, for real: it answers as the one in process does, and never outlives its parent."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from npo_cli.errors import RunFailed
from tests.inference.test_process_supervisor import lives, wait_for
from tests.inference.test_vllm_local import PROMPTS, largest_gap, sync_of, trainers
from tests.inference.vllm_models import make_engine, make_requests, perturb_weights, tied_policy

pytestmark = pytest.mark.vllm
OWNER = """
import signal, sys, time
# A shell's background job ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.inference.vllm_models import make_engine, tied_policy
policy = tied_policy()
server = make_engine('vllm_server', policy)
print(server._process.pid, server._folder, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def served():
    policy = tied_policy()
    server = make_engine("vllm_server", policy)
    yield policy, server
    server.close()


def descendants(pid: int) -> list[int]:
    """Every process below this one, itself included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def test_vllm_server_samples_equal_the_in_process_engine(served):
    policy, server = served
    sync_of(policy, server).sync_weights(0)
    engine = make_engine("vllm", policy)
    sync_of(policy, engine).sync_weights(0)
    requests = make_requests(policy, *PROMPTS)
    theirs = server.generate(requests, temperature=1.0, max_new_tokens=18)
    ours = engine.generate(requests, temperature=1.0, max_new_tokens=18)
    engine.close()
    assert [each.response_ids for each in theirs] == [each.response_ids for each in ours]
    assert largest_gap([each.logps for each in theirs], [each.logps for each in ours]) < 1e-5


def test_vllm_server_weight_sync_finds_stale_weights(served, monkeypatch):
    policy, server = served
    state = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    sync = sync_of(policy, server)
    sync.sync_weights(0)
    perturb_weights(policy, by=0.05)
    sync.sync_weights(1)
    samples = server.generate(make_requests(policy, *PROMPTS), temperature=1.0, max_new_tokens=18)
    assert largest_gap([each.logps for each in samples], trainers(policy, samples)) < 1e-4
    assert not list(server._folder.glob("weights-*"))
    monkeypatch.setattr(server, "_send", lambda tensors, version: None)
    perturb_weights(policy, by=0.05)
    with pytest.raises(RunFailed, match="match the previous weights"):
        sync.sync_weights(2)
    with torch.no_grad():
        policy.model.load_state_dict(state)


def test_vllm_server_needs_the_api_key_on_every_endpoint(served):
    import requests

    _, server = served
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}}
    assert requests.post(f"{server._url}/inference/v1/generate", json=body, timeout=30).status_code == 401
    # vLLM's own key does not guard these
    for path in ("pause", "resume", "reset_prefix_cache", "collective_rpc", "update_weight_version", "health"):
        assert requests.post(f"{server._url}/{path}", json={"new_version": "evil"}, timeout=30).status_code == 401


@pytest.mark.slow
def test_vllm_server_killed_while_sampling_is_reported():
    policy = tied_policy()
    server = make_engine("vllm_server", policy)
    family = descendants(server._process.pid)
    sync_of(policy, server).sync_weights(0)
    requests = make_requests(policy, *PROMPTS, num_slots=400)
    killer = threading.Timer(0.5, lambda: [os.kill(pid, signal.SIGKILL) for pid in family[1:] if lives(pid)])
    killer.start()
    with pytest.raises(RunFailed, match=r"the vLLM server failed \(phase: sample\)") as failed:
        server.generate(requests, temperature=1.0, max_new_tokens=18)
    assert "npo resume" in failed.value.hint
    server.close()
    assert wait_for(lambda: not any(map(lives, family)))


def test_vllm_server_start_error_shows_its_log():
    policy = tied_policy()
    with pytest.raises(RunFailed, match=r"the vLLM server could not start: .*max_model_len"):
        make_engine("vllm_server", policy, max_model_len=100_000)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_vllm_server_ends_with_its_parent(number):
    root = Path(__file__).parents[2]
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=root)
    keeper, folder = owner.stdout.readline().split()
    family = descendants(int(keeper))
    assert len(family) > 1
    time.sleep(0.5)
    os.kill(owner.pid, number)
    owner.wait(timeout=30)
    assert wait_for(lambda: not any(map(lives, family)), seconds=30)
    assert not Path(folder).exists()
