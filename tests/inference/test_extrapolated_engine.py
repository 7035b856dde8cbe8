"""Two models sample one response from pi_t (pi_t / pi_old)^a; it depends on its seed only."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from npo_cli.config.engine import EngineSettings
from npo_cli.config.recipe import ModelSettings
from npo_cli.inference.base import LogprobRequest, Sample, SampleRequest
from npo_cli.inference.extrapolated_engine import ExtrapolatedEngine, extrapolate_logits
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.packing import TokenRow
from tests.helpers.images import load_vision_policy, mixed_prompts
from tests.inference.test_image_prompts import engine_of, image_requests
from tests.inference.test_transformers_engine import TEXTS, sample_requests, sample_responses
from tests.inference.vllm_models import make_handle

ROWS = [TokenRow(prompt_ids=(1, 2, 3), response_ids=(4, 5)), TokenRow(prompt_ids=(2,), response_ids=(6, 7, 8))]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(ModelSettings(threads=1))


@pytest.fixture(scope="module")
def older() -> Policy:
    """The same model with every weight moved a little."""
    return perturbed(load_policy(ModelSettings(threads=1)))


@torch.no_grad()
def perturbed(policy: Policy) -> Policy:
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return policy


def extrapolated_engine(policy: Policy, older: Policy, *, strength: float, max_rows: int = 512) -> ExtrapolatedEngine:
    settings = EngineSettings(max_num_seqs=max_rows)
    return ExtrapolatedEngine(settings, make_handle(policy), older=older.model, strength=strength)


def generate(engine: ExtrapolatedEngine, requests: list[SampleRequest], *, temperature: float = 1.0) -> list[Sample]:
    return engine.generate(requests, temperature=temperature, max_new_tokens=18)


def test_extrapolated_logits_by_hand():
    # a = 2: 1 + 2 (1 - 0) = 3, 0 + 2 (0 - 1) = -2; a token that either model excludes stays excluded
    new, old = torch.tensor([[1.0, 0.0, -torch.inf, 5.0]]), torch.tensor([[0.0, 1.0, 3.0, -torch.inf]])
    assert extrapolate_logits(new, old, 2.0).tolist() == [[3.0, -2.0, -torch.inf, -torch.inf]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_extrapolated_engine_logprobs_equal_the_normalised_product(policy, older, temperature):
    """By definition: log softmax of (1 + a) log pi_t - a log pi_old, by two plain passes over whole responses."""
    requests = sample_requests(policy, TEXTS)
    samples = generate(extrapolated_engine(policy, older, strength=2.0), requests, temperature=temperature)
    for request, sample in zip(requests, samples, strict=True):
        ids = torch.tensor([request.prompt_ids + sample.response_ids])
        with torch.no_grad():
            new, old = (torch.log_softmax(each.model(ids).logits[0] / temperature, dim=-1) for each in (policy, older))
        logps_TW = torch.log_softmax(3.0 * new - 2.0 * old, dim=-1)[len(request.prompt_ids) - 1 : -1]
        expected = [logps_TW[place, token].item() for place, token in enumerate(sample.response_ids)]
        assert sample.logps == pytest.approx(expected, abs=1e-3)


def test_extrapolated_engine_with_strength_0_samples_as_the_newer_policy(policy, older):
    requests = sample_requests(policy, TEXTS)
    plain = sample_responses(policy, requests)
    found = generate(extrapolated_engine(policy, older, strength=0.0), requests)
    assert [one.response_ids for one in found] == [one.response_ids for one in plain]


def test_extrapolated_engine_with_equal_models_samples_as_the_policy(policy):
    requests = sample_requests(policy, TEXTS)
    found = generate(extrapolated_engine(policy, policy, strength=8.0), requests)
    assert [one.response_ids for one in found] == [one.response_ids for one in sample_responses(policy, requests)]


@pytest.mark.parametrize("max_rows", [1, 3])
def test_extrapolated_engine_response_depends_on_its_seed_only(policy, older, max_rows):
    """Prompts of 1 to 12 tokens, so the caches of a batch hold padding."""
    requests = sample_requests(policy, TEXTS)
    together = generate(extrapolated_engine(policy, older, strength=2.0), requests)
    mixed = random.Random(1).sample(requests, len(requests))
    again = {
        (s.prompt_id, s.slot): s
        for s in generate(extrapolated_engine(policy, older, strength=2.0, max_rows=max_rows), mixed)
    }
    for sample in together:
        assert again[sample.prompt_id, sample.slot].response_ids == sample.response_ids
        assert again[sample.prompt_id, sample.slot].logps == pytest.approx(sample.logps, abs=1e-3)


def test_extrapolated_engine_samples_differ_from_both_models(policy, older):
    requests = sample_requests(policy, TEXTS, num_slots=8)
    found = [one.response_ids for one in generate(extrapolated_engine(policy, older, strength=2.0), requests)]
    assert found != [one.response_ids for one in sample_responses(policy, requests)]
    assert found != [one.response_ids for one in sample_responses(older, requests)]


def test_extrapolated_engine_logprobs_equal_the_trainers(policy, older):
    """The trainer's pass over the sampled responses, and the engine's own score of them."""
    requests = sample_requests(policy, TEXTS)
    engine = extrapolated_engine(policy, older, strength=2.0)
    samples = generate(engine, requests)
    rows = [
        TokenRow(prompt_ids=r.prompt_ids, response_ids=s.response_ids) for r, s in zip(requests, samples, strict=True)
    ]
    pair = ExtrapolatedPolicy(newer=policy, older=older, strength=2.0)
    scores = pair.score(rows, temperature=1.0, chunk_tokens=7, columns=["entropies"])
    requests_again = [LogprobRequest(prompt_ids=row.prompt_ids, response_ids=row.response_ids) for row in rows]
    for place, (sample, rescored_T) in enumerate(zip(samples, engine.compute_logps(requests_again), strict=True)):
        length = len(sample.response_ids)
        assert sample.logps == pytest.approx(scores.logps_NT[place, :length].tolist(), abs=1e-3)
        assert sample.mean_entropy == pytest.approx(scores.entropies_NT[place, :length].mean().item(), abs=1e-3)
        assert rescored_T == pytest.approx(sample.logps, abs=1e-3)


def test_extrapolated_score_does_not_depend_on_the_chunk(policy, older):
    pair = ExtrapolatedPolicy(newer=policy, older=older, strength=2.0)
    whole, parts = (pair.score(ROWS, temperature=1.0, chunk_tokens=size) for size in (64, 2))
    assert torch.allclose(whole.logps_NT, parts.logps_NT, atol=1e-5)


def test_extrapolated_sampling_changes_neither_model(policy, older):
    before = policy.digest, older.digest
    generate(extrapolated_engine(policy, older, strength=2.0), sample_requests(policy, TEXTS))
    assert (policy.digest, older.digest) == before


# With images: rows of different lengths, none, one or two images each


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_extrapolated_engine_with_images_and_no_change_samples_as_the_plain_engine(untaught_vl: Path, strength):
    policy, other = load_vision_policy(untaught_vl), load_vision_policy(untaught_vl)
    # with strength 0 the older model does not matter
    other = other if strength else perturbed(other)
    requests = image_requests(policy, mixed_prompts(), num_slots=6)
    plain = engine_of(policy).generate(requests, temperature=1.0, max_new_tokens=6)
    found = extrapolated_engine(policy, other, strength=strength).generate(requests, temperature=1.0, max_new_tokens=6)
    assert [one.response_ids for one in found] == [one.response_ids for one in plain]
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)


@pytest.mark.parametrize("places", [(0, 1, 2, 3), (0,), (1,), (2,)], ids=["all", "one", "blind", "two"])
def test_extrapolated_engine_image_logprobs_equal_the_trainers(untaught_vl: Path, places):
    """Rows of one batch are padded; a single row is not."""
    policy, older = load_vision_policy(untaught_vl), perturbed(load_vision_policy(untaught_vl))
    prompts = [mixed_prompts()[place] for place in places]
    requests = image_requests(policy, prompts, num_slots=6)
    samples = extrapolated_engine(policy, older, strength=2.0).generate(requests, temperature=1.0, max_new_tokens=6)
    rows = [policy.row(prompts[place // 6], sample.response_ids) for place, sample in enumerate(samples)]
    pair = ExtrapolatedPolicy(newer=policy, older=older, strength=2.0)
    extrapolated_NT, plain_NT = (each.score(rows, temperature=1.0, chunk_tokens=64).logps_NT for each in (pair, policy))
    assert (extrapolated_NT - plain_NT).abs().max() > 0.1
    for sample, logps_T in zip(samples, extrapolated_NT.tolist(), strict=True):
        assert sample.logps == pytest.approx(logps_T[: len(sample.logps)], abs=1e-4)


def test_extrapolated_engine_forgets_the_images_of_the_previous_batch(untaught_vl: Path):
    policy, older = load_vision_policy(untaught_vl), perturbed(load_vision_policy(untaught_vl))
    engine = extrapolated_engine(policy, older, strength=2.0)
    engine.generate(image_requests(policy, mixed_prompts(), num_slots=2), temperature=1.0, max_new_tokens=3)
    (request,) = image_requests(policy, mixed_prompts()[1:2], num_slots=1)
    short = replace(request, prompt_ids=request.prompt_ids[-1:])
    found = engine.generate([short], temperature=1.0, max_new_tokens=6)
    alone = extrapolated_engine(
        load_vision_policy(untaught_vl), perturbed(load_vision_policy(untaught_vl)), strength=2.0
    )
    assert found == alone.generate([short], temperature=1.0, max_new_tokens=6)
