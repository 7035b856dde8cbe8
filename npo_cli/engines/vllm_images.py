"""Pictures for vLLM: one token a picture in the prompt, the pixels that the trainer sees, and what it needs to start.

vLLM makes the rest of the image tokens itself, with a processor of its own. Pictures are given to it in the size in
which the trainer's tower sees them, so that its other way of resizing has nothing to do; the tokens are compared.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from npo_cli.engines.requests import Shown, Sight

NEVER = -100.0
"""Added to a logit: the most that vLLM allows."""
OPTIONS: Mapping[str, Any] = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"video": 0}}
"""Of a vLLM that is shown pictures: its processor wants the tokenizer, and no room is kept for videos."""


def save_processor(folder: Path, tokenizer: PreTrainedTokenizerBase, sight: Sight) -> None:
    """What vLLM's processor reads beside the model's config."""
    tokenizer.save_pretrained(folder)
    sight.save(folder)


def silence(sight: Sight | None) -> dict[str, Any]:
    """Fields of a SamplingParams under which the policy's silent tokens are never drawn."""
    return {} if sight is None else {"logit_bias": dict.fromkeys(sight.silent_ids, NEVER)}


def vllm_prompts(prompts: Sequence[Shown], sight: Sight | None) -> list[dict[str, Any]]:
    """Prompts in vLLM's words. A picture that several of them show is opened once."""
    if sight is None:
        return [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
    stills = {ref: sight.still(ref) for prompt in prompts for ref in prompt.images}
    return [
        {
            "prompt_token_ids": _one_token_each(prompt, sight.image_id) if prompt.images else list(prompt.ids),
            **({"multi_modal_data": {"image": [stills[ref] for ref in prompt.images]}} if prompt.images else {}),
        }
        for prompt in prompts
    ]


def _one_token_each(prompt: Shown, image_id: int) -> list[int]:
    """Each run of image tokens as one of them."""
    runs = [(token, len(list(run))) for token, run in groupby(prompt.ids)]
    short = [token for token, length in runs for _ in range(1 if token == image_id else length)]
    assert short.count(image_id) == len(prompt.images), "a picture is one run of image tokens"
    return short


def refuse_other_tokens(prompts: Sequence[Shown], outputs: Sequence[Any]) -> None:
    """The prompt that vLLM made of the pictures is the one that the trainer scores."""
    for prompt, output in zip(prompts, outputs, strict=True):
        if prompt.images and tuple(output.prompt_token_ids) != prompt.ids:
            places = ", ".join(ref.place for ref in prompt.images)
            raise RuntimeError(
                f"it read {len(output.prompt_token_ids)} tokens where the trainer reads {len(prompt.ids)}: {places}"
            )
