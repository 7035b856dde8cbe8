"""What vLLM is told of pictures, without a vLLM."""

from pathlib import Path

import pytest
import torch

from npo_cli.inference.base import EngineInput
from npo_cli.inference.vllm_images import vllm_prompts
from npo_cli.session.weight_sync import build_check_rows
from tests.helpers.images import load_vision_policy, mixed_prompts, resize_image


def test_vllm_prompt_has_one_token_per_image(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    prompts = [EngineInput(token_ids=policy.encode(prompt), images=prompt.images) for prompt in mixed_prompts()]
    converted = vllm_prompts(prompts, policy.vision)
    # 32 x 32 pixels are 4 tokens; 64 x 32 and 32 x 32 are 8 and 4; 48 x 64 are 12
    lost = [
        len(shown.token_ids) - len(each["prompt_token_ids"]) for shown, each in zip(prompts, converted, strict=True)
    ]
    assert lost == [4 - 1, 0, 8 + 4 - 2, 12 - 1]
    sizes = [[still.size for still in each.get("multi_modal_data", {"image": ()})["image"]] for each in converted]
    assert sizes == [[(32, 32)], [], [(64, 32), (32, 32)], [(48, 64)]]


@pytest.mark.parametrize("size", [(45, 70), (32, 32), (300, 40), (9, 11)])
def test_vllm_prompt_image_is_not_resized_again(untaught_vl: Path, size: tuple[int, int]):
    """So it does not matter how vLLM resizes: 45 x 70 is no multiple of 16, 9 x 11 too small, 300 x 40 too large."""
    vision = load_vision_policy(untaught_vl).vision
    ref = resize_image(mixed_prompts()[0].images[0], *size)
    made = vision.processor(images=[vision.resize_image(ref)], return_tensors="pt", do_resize=False)
    assert torch.equal(made["pixel_values"], vision.load_patches(ref).patches)


def test_check_rows_end_after_the_last_image(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    one, blind, several, _ = mixed_prompts()
    rows = build_check_rows(policy, [one, blind, several])
    assert [row.images for row in rows] == [one.images, several.images]
    for row, prompt in zip(rows, (one, several), strict=True):
        assert row.prompt_ids + row.response_ids == policy.encode(prompt)
        assert (
            row.prompt_ids[-1] == policy.vision.image_token_id and policy.vision.image_token_id not in row.response_ids
        )
    # without pictures: the end of a prompt, each token but the first
    assert build_check_rows(policy, [blind])[0].response_ids == policy.encode(blind)[1:]
