"""A tiny Qwen3-VL on real pictures: its tokens, pixels and log-probabilities are those of transformers' own way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from npo_cli.errors import NpoError
from npo_cli.images import open_image
from npo_cli.policy.model import Policy
from npo_cli.policy.packing import TokenRow
from npo_cli.policy.vision import CACHE_BYTES, ImagePatches, PixelCache
from npo_cli.tasks.shapes import shapes_prompts
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, Prompt
from tests.helpers.images import load_vision_policy, mixed_prompts, resize_image


class StillProcessor(Qwen3VLProcessor):
    """transformers' own without videos, which need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **options) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def answers_to(policy: Policy, prompts: list[Prompt]) -> list[TokenRow]:
    """Digits, then the end token: of different lengths."""
    digits = policy.encode_response("12345")
    return [policy.row(prompt, (*digits[place:], policy.end_id)) for place, prompt in enumerate(prompts)]


def test_image_token_count_follows_from_the_size(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    image = shapes_prompts(1, 0)[0].images[0]
    for width, height, patches in ((32, 32, (4, 4)), (64, 32, (4, 8)), (48, 64, (8, 6))):
        # patches of 8 x 8 pixels, and 2 x 2 patches are one token
        shown = resize_image(image, width, height)
        made = policy.vision.processor(images=[open_image(shown)], return_tensors="pt")
        assert made["image_grid_thw"].tolist() == [[1, *patches]]
        prompt = Prompt(prompt_id="one", answer="1", text=f"how{IMAGE_PLACEHOLDER}?", images=(shown,))
        assert policy.encode(prompt).count(policy.vision.config.image_token_id) == patches[0] * patches[1] // 4


def test_image_batch_scores_equal_each_row_alone(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    rows = answers_to(policy, mixed_prompts())
    together_NT = policy.score(rows, temperature=1.0, chunk_tokens=4).logps_NT
    for row, logps_T in zip(rows, together_NT, strict=True):
        alone_T = policy.score([row], temperature=1.0, chunk_tokens=64).logps_NT[0]
        assert torch.allclose(alone_T, logps_T[: len(alone_T)], atol=1e-5)


def test_image_inputs_equal_those_of_transformers_processor(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    whole = StillProcessor(policy.vision.processor, policy.tokenizer, policy.tokenizer.chat_template)
    prompt = mixed_prompts()[2]
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>many<|vision_start|><|image_pad|><|vision_end|>?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    theirs = whole(text=[text], images=[open_image(image) for image in prompt.images], return_tensors="pt")
    assert list(policy.encode(prompt)) == theirs["input_ids"][0].tolist()
    ours = policy.vision.build_inputs(theirs["input_ids"], [prompt.images])
    for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(ours[name], theirs[name]), name


def test_image_scores_equal_a_plain_forward_pass(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    row = answers_to(policy, mixed_prompts())[2]
    ids_1L = torch.tensor([row.prompt_ids + row.response_ids])
    with torch.no_grad():
        logits_LW = policy.model(ids_1L, **policy.vision.build_inputs(ids_1L, [row.images])).logits[0]
    logits_LW[:, list(policy.vision.suppressed_ids)] = -torch.inf
    first = len(row.prompt_ids)
    wanted_T = logits_LW.log_softmax(-1)[first - 1 : -1].gather(1, ids_1L[0, first:, None])[:, 0]
    scored = policy.score([row], temperature=1.0, chunk_tokens=2, columns=["entropies"])
    assert torch.allclose(scored.logps_NT[0], wanted_T, atol=1e-5)
    assert torch.isfinite(scored.entropies_NT).all()


def test_image_scores_depend_on_pixels_and_order(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    prompt = mixed_prompts()[2]
    first, second = prompt.images
    swapped = replace(prompt, images=(resize_image(second, 64, 32), resize_image(first, 32, 32)))
    assert policy.encode(swapped) == policy.encode(prompt)
    scores = [policy.score(answers_to(policy, [each]), temperature=1.0, chunk_tokens=64) for each in (prompt, swapped)]
    assert (scores[0].logps_NT - scores[1].logps_NT).abs().max() > 1e-4


def test_image_token_in_a_text_is_refused(untaught_vl: Path):
    policy = load_vision_policy(untaught_vl)
    prompt = mixed_prompts()[1]
    spelled = replace(prompt, messages=(replace(prompt.messages[0], content="<|image_pad|>?"),))
    with pytest.raises(NpoError, match=r"prompt blind has 0 images, but .* 1 placeholders"):
        policy.encode(spelled)


def test_image_too_narrow_for_the_model_is_refused(untaught_vl: Path):
    image = shapes_prompts(1, 0)[0].images[0]
    prompt = Prompt(prompt_id="thin", answer="1", text=IMAGE_PLACEHOLDER, images=(resize_image(image, 804, 4),))
    # 804 : 4 = 201 : 1, and 200 : 1 is the most
    with pytest.raises(NpoError, match=r"prompt thin, .*size 804 x 4 is not supported"):
        load_vision_policy(untaught_vl).encode(prompt)


def test_vision_checkpoint_is_a_complete_model_folder(untaught_vl: Path, tmp_path: Path):
    policy = load_vision_policy(untaught_vl)
    rows = answers_to(policy, mixed_prompts())
    policy.save(tmp_path)
    again = load_vision_policy(tmp_path)
    assert again.digest == policy.digest
    wanted = policy.score(rows, temperature=1.0, chunk_tokens=64).logps_NT
    assert torch.equal(
        again.score(answers_to(again, mixed_prompts()), temperature=1.0, chunk_tokens=64).logps_NT, wanted
    )
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert theirs.state_dict().keys() == policy.model.state_dict().keys()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == policy.tokenizer.chat_template
    assert AutoImageProcessor.from_pretrained(tmp_path, backend="pil").patch_size == 8


def test_vision_lora_targets_the_language_model_by_default(untaught_vl: Path):
    names = load_vision_policy(untaught_vl, lora=2).adapter_weights
    assert names and all(".language_model." in name for name in names)


def test_pixel_cache_evicts_the_oldest():
    half = ImagePatches(patches=torch.zeros(CACHE_BYTES // 8), grid_13=torch.ones(1, 3))
    cache = PixelCache()
    cache.put("a", half)
    cache.put("b", half)
    # four bytes a number: two halves fill it; looking at the first makes the second the oldest
    cache.put("a", cache.pop("a"))
    cache.put("c", half)
    assert [name for name in "abc" if cache.pop(name) is not None] == ["a", "c"]
