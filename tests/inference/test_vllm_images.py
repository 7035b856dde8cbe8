"""vLLM for real, on a CPU, with a tiny Qwen3-VL: the trainer's tokens and pixels, and a stale tower is told."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from npo_cli.config.loading import load_recipe
from npo_cli.errors import RunFailed
from npo_cli.inference import vllm_common, vllm_local, vllm_server
from npo_cli.inference.base import LogprobRequest, Sample, SampleRequest
from npo_cli.inference.vllm_local import VllmEngine
from npo_cli.inference.vllm_server import VllmServer
from npo_cli.policy.model import Policy
from npo_cli.seeds import derive_seed
from npo_cli.session.session import make_adapter_port
from npo_cli.session.weight_sync import WeightSync, build_check_rows
from tests.helpers.images import load_vision_policy, mixed_prompts
from tests.inference.vllm_models import make_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM reads pictures with torchvision"),
]
Vllm = VllmEngine | VllmServer
KINDS = ("vllm", "vllm_server")


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, untaught_vl: Path) -> Iterator[tuple[Policy, Vllm, WeightSync]]:
    policy = load_vision_policy(untaught_vl)
    engine = make_engine(request.param, policy, max_model_len=128)
    rows = build_check_rows(policy, mixed_prompts())
    yield (
        policy,
        engine,
        WeightSync(recipe=load_recipe("micro", []), policy=policy, engine=engine, check_rows=rows, run_nonce="ab"),
    )
    engine.close()


def requests_of(policy: Policy) -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt_id=prompt.prompt_id,
            prompt_ids=policy.encode(prompt),
            images=prompt.images,
            slot=slot,
            seed=derive_seed(0, prompt.prompt_id, slot),
        )
        for prompt in mixed_prompts()
        for slot in range(8)
    ]


def assert_sampled_as_scored(policy: Policy, samples: list[Sample]) -> None:
    prompts = {prompt.prompt_id: prompt for prompt in mixed_prompts()}
    rows = [policy.row(prompts[each.prompt_id], each.response_ids) for each in samples]
    with torch.no_grad():
        scores_NT = policy.score(rows, temperature=1.0, chunk_tokens=4096).logps_NT
    for sample, logps_T in zip(samples, scores_NT, strict=True):
        assert torch.allclose(torch.tensor(sample.logps), logps_T[: len(sample.logps)], atol=1e-4)


def test_vllm_image_logprobs_equal_the_trainers(pair: tuple[Policy, Vllm, WeightSync]):
    policy, engine, sync = pair
    sync.sync_weights(0)
    requests = requests_of(policy)
    samples = engine.generate(requests, temperature=1.0, max_new_tokens=6)
    assert_sampled_as_scored(policy, samples)
    # an untaught model would write one of the two silent tokens of 30 about once in 15 tokens
    written = [token for sample in samples for token in sample.response_ids]
    assert len(written) > 100 and not set(written) & set(policy.vision.suppressed_ids)
    assert engine.generate(requests[::-1], temperature=1.0, max_new_tokens=6)[::-1] == samples


def test_vllm_image_with_another_number_of_tokens_is_refused(pair: tuple[Policy, Vllm, WeightSync]):
    policy, engine, sync = pair
    sync.sync_weights(0)
    one, _, _, four = mixed_prompts()
    request = LogprobRequest(prompt_ids=policy.encode(one), response_ids=(policy.end_id,), images=one.images)
    num_tokens = len(request.prompt_ids) + 1
    # 32 x 32 pixels are 2 x 2 tokens, 48 x 64 are 3 x 4: eight more
    with pytest.raises(RunFailed, match=f"vLLM reads {num_tokens + 8} prompt tokens, the trainer {num_tokens}"):
        engine.compute_logps([replace(request, images=four.images)])


def test_vllm_weight_sync_finds_a_stale_vision_tower(
    pair: tuple[Policy, Vllm, WeightSync], monkeypatch: pytest.MonkeyPatch
):
    policy, engine, sync = pair
    sync.sync_weights(0)
    sent = policy.model.state_dict()
    old = {name: tensor.clone() for name, tensor in sent.items() if ".visual." in name}
    with torch.no_grad():
        for name in old:
            sent[name] += 0.05 * torch.randn(sent[name].shape, generator=torch.Generator().manual_seed(1))
    whole = vllm_common.named_tensors
    with monkeypatch.context() as patched:
        for module in (vllm_common, vllm_local, vllm_server):
            patched.setattr(module, "named_tensors", lambda model: whole(model) | old)
        with pytest.raises(RunFailed, match="match the previous weights"):
            sync.sync_weights(1)
    sync.sync_weights(1)
    assert_sampled_as_scored(policy, engine.generate(requests_of(policy), temperature=1.0, max_new_tokens=6))


@pytest.mark.parametrize("pair", ["vllm_server"], indirect=True)
def test_vllm_server_downloads_no_image(pair: tuple[Policy, VllmServer, WeightSync]):
    policy, engine, sync = pair
    sync.sync_weights(0)
    requests = []

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Door) as door:
        threading.Thread(target=door.serve_forever, daemon=True).start()
        part = {"type": "image_url", "url": f"http://127.0.0.1:{door.server_port}/picture.png"}
        body = {
            "token_ids": [policy.vision.image_token_id],
            "content_parts": [part],
            "sampling_params": {"max_tokens": 1},
        }
        answer = engine._session.post(f"{engine._url}/inference/v1/generate", json=body, timeout=60)
        door.shutdown()
    assert not answer.ok and "allowed domains" in answer.text
    assert requests == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_image_logprobs_with_lora_equal_the_trainers(kind: str, untaught_vl: Path):
    policy = load_vision_policy(untaught_vl, lora=4)
    with torch.no_grad():
        for name, tensor in policy.model.named_parameters():
            if "lora_B" in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    adapters = make_adapter_port(policy, policy.adapters)
    engine = make_engine(kind, policy, max_model_len=128, adapters=adapters)
    rows = build_check_rows(policy, mixed_prompts())
    try:
        WeightSync(
            recipe=load_recipe("micro", []), policy=policy, engine=engine, check_rows=rows, run_nonce="ab"
        ).sync_weights(0)
        assert_sampled_as_scored(policy, engine.generate(requests_of(policy), temperature=1.0, max_new_tokens=6))
    finally:
        engine.close()
