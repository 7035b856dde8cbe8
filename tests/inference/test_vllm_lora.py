"""Adapters of one base in vLLM, in process and in a server: each answers for itself, none is merged, none is stale."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from npo_cli.config.recipe import LoraSettings, ModelSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import LogprobRequest, Sample, SampleRequest, open_engine
from npo_cli.inference.vllm_local import round_up_lora_rank
from npo_cli.policy.extrapolated import extrapolate_weights
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.packing import TokenRow
from npo_cli.session.session import make_adapter_port
from tests.inference.vllm_models import make_engine, make_handle, make_requests, make_settings

PROMPTS = ("321+654=", "12+9=", "....1+2=")


def lora_policy(rank: int = 4) -> Policy:
    return load_policy(ModelSettings(threads=1, lora=LoraSettings(rank=rank)))


@torch.no_grad()
def turned(policy: Policy, *, seed: int) -> None:
    """Other adapters: B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in policy.adapter_weights.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) / 10)


@pytest.fixture(scope="module", params=["vllm", pytest.param("vllm_server", marks=pytest.mark.slow)])
def served(request) -> Iterator[tuple]:
    """A policy, an engine with four places, and three adapters in it, with the trainer's scores of each."""
    pytest.importorskip("vllm")
    policy = lora_policy(rank=8)
    engine = make_engine(request.param, policy, adapters=make_adapter_port(policy, policy.adapters, doubles_rank=True))
    try:
        yield policy, engine, filled(policy, engine)
    finally:
        engine.close()


def filled(policy: Policy, engine) -> dict[str, torch.Tensor]:
    """Three versions side by side; the trainer's log-probabilities of one response under each."""
    scores = {}
    for number in range(3):
        if number:
            turned(policy, seed=number)
        version = f"step {number}, write {policy.num_weight_changes}, run ab"
        engine.update_weights(policy.model, version=version)
        scores[version] = trainer_scores(policy)
        (found,) = engine.compute_logps([response()])
        assert found == pytest.approx(scores[version].tolist(), abs=1e-4), "the newest answers where nobody is named"
    return scores


def response() -> LogprobRequest:
    return LogprobRequest(prompt_ids=(3, 2, 1, 13, 6, 5, 4, 14), response_ids=(9, 12, 7, 12, 5, 12, 15, 4))


def trainer_scores(policy: Policy) -> torch.Tensor:
    row = TokenRow(prompt_ids=response().prompt_ids, response_ids=response().response_ids)
    with torch.no_grad():
        return policy.score([row], temperature=1.0, chunk_tokens=4096).logps_NT[0]


def sampled(engine, requests: Sequence[SampleRequest]) -> list[Sample]:
    return engine.generate(requests, temperature=1.0, max_new_tokens=18)


def named(policy: Policy, version: str) -> list[SampleRequest]:
    return [replace(request, version=version) for request in make_requests(policy, *PROMPTS, num_slots=4)]


@pytest.mark.vllm
def test_vllm_lora_adapters_in_one_batch_equal_each_alone(served, tmp_path):
    policy, engine, scores = served
    versions = list(scores)
    together = sampled(engine, [request for version in versions for request in named(policy, version)])
    apart = [sample for version in versions for sample in sampled(engine, named(policy, version))]
    assert together == apart
    # The same prompts and seeds: only the adapters differ, so a shared prefix would show.
    texts = [tuple(sample.text for sample in together[12 * place : 12 * place + 12]) for place in range(3)]
    assert len(set(texts)) == 3
    newest = together[24:]
    rows = [
        TokenRow(prompt_ids=r.prompt_ids, response_ids=s.response_ids)
        for r, s in zip(named(policy, ""), newest, strict=True)
    ]
    with torch.no_grad():
        ours = policy.score(rows, temperature=1.0, chunk_tokens=4096).logps_NT
    for sample, logps in zip(newest, ours, strict=True):
        assert sample.logps == pytest.approx(logps[: len(sample.logps)].tolist(), abs=1e-4)


@pytest.mark.vllm
def test_vllm_lora_unloads_the_oldest_adapters(served):
    policy, engine, scores = served
    first, *others = scores
    assert engine.num_versions == 4
    for number in (7, 8):
        turned(policy, seed=number)
        engine.update_weights(policy.model, version=f"later {number}")
    with pytest.raises(RunFailed, match="the engine does not hold the weights step 0, "):
        sampled(engine, named(policy, first))
    assert sampled(engine, named(policy, others[-1]))
    (found,) = engine.compute_logps([response()])
    assert found == pytest.approx(trainer_scores(policy).tolist(), abs=1e-4)


@pytest.mark.vllm
def test_vllm_lora_serves_extrapolated_adapters(served, tmp_path):
    policy, engine, _ = served
    policy.save(tmp_path)
    turned(policy, seed=5)
    own = trainer_scores(policy)
    engine.update_weights(policy.model, version="own")
    with extrapolate_weights(policy, tmp_path, strength=0.5):
        engine.update_weights(policy.model, version="pushed")
        theirs = trainer_scores(policy)
        (found,) = engine.compute_logps([response()])
        assert found == pytest.approx(theirs.tolist(), abs=1e-4)
    assert (own - theirs).abs().max() > 0.01
    both = sampled(engine, named(policy, "own") + named(policy, "pushed"))
    assert both[:12] == sampled(engine, named(policy, "own"))
    assert [one.text for one in both[:12]] != [one.text for one in both[12:]]


@pytest.mark.vllm
def test_vllm_lora_refuses_nan(served):
    policy, engine, _ = served
    before = engine.version
    (name, tensor), *_ = policy.adapter_weights.items()
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor[0, 0] = float("nan")
    with pytest.raises(RunFailed, match=f"tensors not finite: {name}"):
        engine.update_weights(policy.model, version="nan")
    with torch.no_grad():
        tensor.copy_(kept)
    assert engine.version == before


def test_vllm_lora_rank_is_rounded_up_to_one_that_vllm_supports():
    assert [round_up_lora_rank(rank) for rank in (1, 8, 9, 64, 300)] == [8, 8, 16, 64, 512]
    with pytest.raises(NpoError, match="up to rank 512, got 513"):
        round_up_lora_rank(513)


def test_vllm_server_refuses_lora_adapters_over_nccl():
    policy = lora_policy()
    settings = make_settings("vllm_server", weight_transfer="nccl")
    handle = make_handle(policy, adapters=make_adapter_port(policy, policy.adapters))
    with pytest.raises(NpoError, match=r"weight_transfer=nccl does not support LoRA adapters \(model\.lora\.rank\)"):
        open_engine(settings, handle)
