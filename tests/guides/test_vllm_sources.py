"""Guide caches through a real vLLM: an outside model behind the engine, and vLLM's own server at an address."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

from npo_cli.guides.dense_target import open_teacher
from npo_cli.guides.served_teacher import ServedTeacher
from npo_cli.policy.model import load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.policy.packing import TokenRow
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from tests.helpers.runs import copy_run, open_session_at, sample, tiny_recipe, train, trajectories
from tests.helpers.teachers import save_with_other_vocabulary

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
NAMED = {"name": "guided"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """`vllm serve` of the micro base under the name teacher, with a key."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = {
        "--model": str(MICRO_BASE_FOLDER),
        "--served-model-name": "teacher",
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    options |= {"--dtype": "float32", "--max-model-len": "64", "--max-num-seqs": "16", "--api-key": "sesame"}
    words = [part for option in options.items() for part in option]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager"]
    with (tmp_path_factory.mktemp("server") / "log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while not healthy(port):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=60)


def healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def test_openai_source_of_a_vllm_server_equals_the_policy(scout, tmp_path, server, monkeypatch):
    """The base behind an address and as a checkpoint: pass@1 of 8 prompts x 64 samples agrees but for chance."""
    monkeypatch.setenv("NPO_ENDPOINT_KEY", "sesame")
    root = copy_run(scout, tmp_path / "run")
    many = ("guide.cache.samples_per_prompt=64", "guide.cache.select=shortest", "guide.endpoint.concurrency=16")
    theirs = sample(root, *many, source=f"endpoint:{server}#teacher", **NAMED)
    ours = sample(root, *many, source="base", name="ours")
    assert theirs.num_samples == ours.num_samples == 512
    found = trajectories(root, "guided")
    assert found
    caches = [load_guide(open_run(root), name)[1].values() for name in ("guided", "ours")]
    shares = [sum(samples.num_correct for samples in cache) / 512 for cache in caches]
    assert shares[0] == pytest.approx(shares[1], abs=4 * 0.022 * 2**0.5)
    session = open_session_at(root, 2)
    for kept in found.values():
        assert kept.response_ids == (*session.policy.tokenizer(kept.text).input_ids, *session.policy.eos_ids)
    # an answer of n characters is n + 1 tokens to both: the server's count is the learner's
    assert theirs.num_tokens == pytest.approx(ours.num_tokens, rel=0.1)


@pytest.mark.parametrize("tokens", ["same", "other"])
def test_external_model_samples_with_the_engine_of_the_recipe(scout, tmp_path, tokens):
    root = copy_run(scout, tmp_path / "run")
    same = find_checkpoint(open_run(root), "main", 4).path
    folder = same if tokens == "same" else save_with_other_vocabulary(tmp_path / "foreign")
    info = sample(root, "engine.kind=vllm", "guide.cache.samples_per_prompt=16", source=f"model:{folder}", **NAMED)
    found = trajectories(root, "guided")
    assert found
    assert info.has_logps == (tokens == "same")
    assert {kept.source for kept in found.values()} == {"teacher"}


def test_vllm_server_as_teacher_of_a_dense_target_says_what_the_trainer_does(scout, tmp_path, server, monkeypatch):
    """Log-probabilities of given token ids and of the 5 most probable tokens, against the trainer's own pass."""
    monkeypatch.setenv("NPO_ENDPOINT_KEY", "sesame")
    spec = f"target.teacher=endpoint:{server}#teacher"
    recipe = tiny_recipe("target.kind=distribution", spec, "target.top_k=5")
    policy = load_policy(recipe.model)
    teacher = open_teacher(open_run(scout), recipe, policy, parent=None, fork_step=0)
    assert isinstance(teacher, ServedTeacher)
    rows = [TokenRow(prompt_ids=(1, 2, 3, 12), response_ids=ids) for ids in ((4, 5, 6), (7, 14), (15,))]
    expected = policy.score(rows, temperature=1.0, chunk_tokens=64).logps_NT
    assert torch.allclose(teacher.score(rows, temperature=1.0, chunk_tokens=64).logps_NT, expected, atol=1e-4)
    logps_W = policy.model(torch.tensor([[1, 2, 3, 12]])).logits[0, -1].log_softmax(-1)
    (token, *_), *_ = teacher.score_tokens(rows)
    assert list(token.top) == logps_W.topk(5).indices.tolist()
    assert list(token.top.values()) == pytest.approx(logps_W.topk(5).values.tolist(), abs=1e-4)
    reports = train(
        tmp_path / "run", "target.kind=distribution", spec, "target.top_k=5", "train.num_steps=2", "train.lr=1e-3"
    )
    assert abs(reports[0].metrics["target/kl"]) < 1e-4 < reports[1].metrics["target/kl"]
