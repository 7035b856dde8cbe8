"""Images for vLLM: one placeholder token per image in the prompt, the pixels, and the options for starting.

vLLM expands the placeholders with a processor of its own. Images are passed in the size that the trainer's vision tower
reads, so that vLLM's resizing changes nothing; the resulting tokens are compared with the trainer's.
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
"""The lowest logit bias that vLLM allows."""
IMAGE_ENGINE_OPTIONS: Mapping[str, Any] = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"video": 0}}
"""Options for images: the processor needs the tokenizer, and no memory is reserved for videos."""
IMAGE_SERVER_FLAGS = ("--limit-mm-per-prompt", '{"video": 0}', "--allowed-media-domains", "nowhere.invalid")
"""The same for the server, which must not download images: an empty list of domains would allow all of them."""


def save_processor(folder: Path, tokenizer: PreTrainedTokenizerBase, vision: VisionProcessor) -> None:
    """Write the files that vLLM's processor reads besides the model's config."""
    tokenizer.save_pretrained(folder)
    vision.save(folder)


def suppression_fields(vision: VisionProcessor | None) -> dict[str, Any]:
    """SamplingParams fields under which suppressed tokens are never sampled."""
    return {} if vision is None else {"logit_bias": dict.fromkeys(vision.suppressed_ids, BANNED_LOGIT_BIAS)}


def vllm_prompts(prompts: Sequence[EngineInput], vision: VisionProcessor | None) -> list[dict[str, Any]]:
    """Prompts in vLLM's form. An image in several prompts is opened once."""
    if vision is None:
        return [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    images = {ref: vision.resize_image(ref) for prompt in prompts for ref in prompt.images}
    return [
        {
            "prompt_token_ids": _collapse_image_tokens(prompt, vision.image_token_id)
            if prompt.images
            else list(prompt.token_ids),
            **({"multi_modal_data": {"image": [images[ref] for ref in prompt.images]}} if prompt.images else {}),
        }
        for prompt in prompts
    ]


def server_prompts(prompts: Sequence[EngineInput], vision: VisionProcessor | None) -> list[dict[str, Any]]:
    """Prompts in the form of vLLM's server: images are inlined, and the expanded prompt tokens come back."""
    urls = {
        ref: _data_url(vision.resize_image(ref))
        for ref in dict.fromkeys(ref for each in prompts for ref in each.images)
    }
    return [
        {
            "token_ids": _collapse_image_tokens(prompt, vision.image_token_id),
            "content_parts": [{"type": "image_url", "url": urls[ref]} for ref in prompt.images],
            "return_token_ids": True,
        }
        if prompt.images
        else {"token_ids": list(prompt.token_ids)}
        for prompt in prompts
    ]


def _data_url(image: "Image.Image") -> str:
    """The image as a PNG data URL; low compression, since it stays on this machine."""
    png = BytesIO()
    image.save(png, format="PNG", compress_level=1)
    return f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"


def _collapse_image_tokens(prompt: EngineInput, image_id: int) -> list[int]:
    """Token ids with each run of image tokens collapsed into one."""
    runs = [(token, len(list(run))) for token, run in groupby(prompt.token_ids)]
    collapsed = [token for token, length in runs for _ in range(1 if token == image_id else length)]
    assert collapsed.count(image_id) == len(prompt.images), "an image is one run of image tokens"
    return collapsed


def check_prompt_tokens(prompts: Sequence[EngineInput], outputs: Sequence[Any]) -> None:
    """Check that vLLM expanded the prompt to the same tokens as the trainer."""
    for prompt, output in zip(prompts, outputs, strict=True):
        if prompt.images and tuple(output.prompt_token_ids) != prompt.token_ids:
            images = ", ".join(ref.location for ref in prompt.images)
            counts = f"{len(output.prompt_token_ids)} prompt tokens, the trainer {len(prompt.token_ids)}"
            raise RuntimeError(f"with {images} vLLM reads {counts}")
