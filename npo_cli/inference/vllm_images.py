"""Pictures for vLLM: one token a picture in the prompt, the pixels that the trainer sees, and what it needs to start.

vLLM makes the rest of the image tokens itself, with a processor of its own. Pictures are given to it in the size in
which the trainer's tower sees them, so that its other way of resizing has nothing to do; the tokens are compared.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from npo_cli.inference.base import EngineInput, VisionProcessor

if TYPE_CHECKING:
    from PIL import Image

BANNED_LOGIT_BIAS = -100.0
"""Added to a logit: the most that vLLM allows."""
IMAGE_ENGINE_OPTIONS: Mapping[str, Any] = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"video": 0}}
"""Of a vLLM that is shown pictures: its processor wants the tokenizer, and no room is kept for videos."""
IMAGE_SERVER_FLAGS = ("--limit-mm-per-prompt", '{"video": 0}', "--allowed-media-domains", "nowhere.invalid")
"""The same of its server, which fetches no picture from anywhere: an empty list of domains would mean all of them."""


def save_processor(folder: Path, tokenizer: PreTrainedTokenizerBase, sight: VisionProcessor) -> None:
    """What vLLM's processor reads beside the model's config."""
    tokenizer.save_pretrained(folder)
    sight.save(folder)


def suppression_fields(sight: VisionProcessor | None) -> dict[str, Any]:
    """Fields of a SamplingParams under which the policy's silent tokens are never drawn."""
    return {} if sight is None else {"logit_bias": dict.fromkeys(sight.suppressed_ids, BANNED_LOGIT_BIAS)}


def vllm_prompts(prompts: Sequence[EngineInput], sight: VisionProcessor | None) -> list[dict[str, Any]]:
    """Prompts in vLLM's words. A picture that several of them show is opened once."""
    if sight is None:
        return [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    stills = {ref: sight.resize_image(ref) for prompt in prompts for ref in prompt.images}
    return [
        {
            "prompt_token_ids": _one_token_each(prompt, sight.image_token_id)
            if prompt.images
            else list(prompt.token_ids),
            **({"multi_modal_data": {"image": [stills[ref] for ref in prompt.images]}} if prompt.images else {}),
        }
        for prompt in prompts
    ]


def server_prompts(prompts: Sequence[EngineInput], sight: VisionProcessor | None) -> list[dict[str, Any]]:
    """The same in the words of vLLM's server: pictures travel inside, and the tokens made of them come back."""
    urls = {
        ref: _data_url(sight.resize_image(ref)) for ref in dict.fromkeys(ref for each in prompts for ref in each.images)
    }
    return [
        {
            "token_ids": _one_token_each(prompt, sight.image_token_id),
            "content_parts": [{"type": "image_url", "url": urls[ref]} for ref in prompt.images],
            "return_token_ids": True,
        }
        if prompt.images
        else {"token_ids": list(prompt.token_ids)}
        for prompt in prompts
    ]


def _data_url(still: "Image.Image") -> str:
    """The picture itself, without loss, as a url; packed quickly, for it goes no further than this machine."""
    packed = BytesIO()
    still.save(packed, format="PNG", compress_level=1)
    return f"data:image/png;base64,{b64encode(packed.getvalue()).decode()}"


def _one_token_each(prompt: EngineInput, image_id: int) -> list[int]:
    """Each run of image tokens as one of them."""
    runs = [(token, len(list(run))) for token, run in groupby(prompt.token_ids)]
    short = [token for token, length in runs for _ in range(1 if token == image_id else length)]
    assert short.count(image_id) == len(prompt.images), "a picture is one run of image tokens"
    return short


def check_prompt_tokens(prompts: Sequence[EngineInput], outputs: Sequence[Any]) -> None:
    """The prompt that vLLM made of the pictures is the one that the trainer scores."""
    for prompt, output in zip(prompts, outputs, strict=True):
        if prompt.images and tuple(output.prompt_token_ids) != prompt.token_ids:
            places = ", ".join(ref.location for ref in prompt.images)
            raise RuntimeError(
                f"it read {len(output.prompt_token_ids)} tokens where the trainer reads {len(prompt.token_ids)}: {places}"  # noqa: E501
            )
