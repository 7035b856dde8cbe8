"""Sampling with images: log-probabilities equal the trainer's, independent of the rest of the batch."""

import random
from dataclasses import replace
from pathlib import Path

import torch

from npo_cli.config.engine import EngineSettings
from npo_cli.inference.base import SampleRequest
from npo_cli.inference.transformers_engine import TransformersEngine
from npo_cli.policy.model import Policy
from npo_cli.seeds import derive_seed
from npo_cli.tasks.shapes import shapes_prompts
from npo_cli.types.rollouts import Prompt
from tests.helpers.images import load_vision_policy, mixed_prompts
from tests.inference.vllm_models import make_handle


def engine_of(policy: Policy, *, max_rows: int = 512) -> TransformersEngine:
    return TransformersEngine(EngineSettings(max_num_seqs=max_rows), make_handle(policy))


def image_requests(policy: Policy, prompts: list[Prompt], *, num_slots: int) -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt_id=prompt.prompt_id,
            prompt_ids=policy.encode(prompt),
            slot=slot,
            seed=derive_seed(0, prompt.prompt_id, slot),
            images=prompt.images,
        )
        for prompt in prompts
        for slot in range(num_slots)
    ]


def test_image_prompt_logprobs_equal_the_trainers(untaught_vl: Path):
    """Random weights sample any token: 4 x 8 responses of up to 6 tokens cover much of the vocabulary."""
    policy, prompts = load_vision_policy(untaught_vl), mixed_prompts()
    samples = engine_of(policy).generate(
        image_requests(policy, prompts, num_slots=8), temperature=1.0, max_new_tokens=6
    )
    rows = [policy.row(prompts[place // 8], sample.response_ids) for place, sample in enumerate(samples)]
    scored_NT = policy.score(rows, temperature=1.0, chunk_tokens=64).logps_NT
    assert len({token for sample in samples for token in sample.response_ids}) > 20
    for sample, logps_T in zip(samples, scored_NT, strict=True):
        assert torch.allclose(torch.tensor(sample.logps), logps_T[: len(sample.logps)], atol=1e-5)


def test_image_prompt_response_depends_on_its_seed_only(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    requests = image_requests(policy, mixed_prompts(), num_slots=3)
    engine = engine_of(policy)
    together = engine.generate(requests, temperature=1.0, max_new_tokens=5)
    shuffled = random.Random(1).sample(requests, len(requests))
    apart = engine_of(policy, max_rows=2).generate(shuffled, temperature=1.0, max_new_tokens=5)
    found = {(sample.prompt_id, sample.slot): sample.response_ids for sample in apart}
    assert {(sample.prompt_id, sample.slot): sample.response_ids for sample in together} == found


def test_image_prompts_with_equal_tokens_and_other_images_differ(untaught_vl: Path):
    """The same ids and the same seed, side by side: only what the image tokens show differs."""
    policy = load_vision_policy(untaught_vl)
    one, *_, other = shapes_prompts(6, 0)
    first = image_requests(policy, [one], num_slots=1)[0]
    second = replace(first, prompt_id="other", images=other.images)
    samples = engine_of(policy).generate([first, second], temperature=1.0, max_new_tokens=4)
    alone = engine_of(policy).generate([second], temperature=1.0, max_new_tokens=4)
    assert samples[0].logps[0] != samples[1].logps[0]
    assert torch.allclose(torch.tensor(samples[1].logps), torch.tensor(alone[0].logps), atol=1e-5)


def test_image_tokens_are_never_sampled(untaught_vl: Path):
    """At temperature 50 all 29 words are about as likely: of 64 x 8 tokens some 18 would be one of the two."""
    policy = load_vision_policy(untaught_vl)
    requests = image_requests(policy, mixed_prompts(), num_slots=16)
    samples = engine_of(policy).generate(requests, temperature=50.0, max_new_tokens=8)
    written = {token for sample in samples for token in sample.response_ids}
    assert not written & set(policy.vision.suppressed_ids)
    assert len(written) == len(policy.tokenizer) - 2
