"""Images for a vision-language model: image tokens in the prompt, and the pixels behind them.

Pixels are made by transformers' Pillow processor even if others are installed, so that they are the same everywhere.
The number of image tokens follows from the image's size, so encoding a prompt opens no image. The policy never samples
an image token, which would stand for an image that does not exist: its probability is 0 in sampling and in scoring.
Only Qwen3-VL is supported.

Axes: B rows, L positions.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from npo_cli.errors import NpoError
from npo_cli.images import open_image, require_pillow
from npo_cli.policy.packing import PackedRows, TokenRow
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, ImageRef, Prompt

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor

SUPPORTED_MODEL_TYPES = ("qwen3_vl",)
"""config.model_type of supported models."""
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files of the image processor in a model's folder."""
CACHE_BYTES = 256 << 20

RowImages = tuple[ImageRef, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePatches:
    """One image as input of the vision tower."""

    patches: Tensor
    """One flattened patch per row."""
    grid_13: Tensor
    """Number of frames, and of rows and columns of patches."""


@dataclass(slots=True)
class PixelCache:
    """The most recent images by digest, together at most CACHE_BYTES (or one image)."""

    _held: "OrderedDict[str, ImagePatches]" = field(default_factory=OrderedDict)
    _num_bytes: int = 0

    def pop(self, digest: str) -> ImagePatches | None:
        """Remove an image from the cache; None if it is not there."""
        found = self._held.pop(digest, None)
        self._num_bytes -= 0 if found is None else found.patches.nbytes
        return found

    def put(self, digest: str, pixels: ImagePatches) -> None:
        """Add an image as the most recent, and evict the oldest."""
        self._held[digest] = pixels
        self._num_bytes += pixels.patches.nbytes
        while self._num_bytes > CACHE_BYTES and len(self._held) > 1:
            self._num_bytes -= self._held.popitem(last=False)[1].patches.nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Vision:
    """Image processing of a policy."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    processor: "BaseImageProcessor"
    files: Mapping[str, bytes]
    """The processor's files by name; every checkpoint gets a copy."""
    suppressed_ids: tuple[int, ...]
    """Tokens with probability 0."""
    _cache: "PixelCache" = field(default_factory=PixelCache)

    @property
    def image_token_id(self) -> int:
        """The placeholder token; an image takes several of them."""
        return self.config.image_token_id

    def render_prompt(self, prompt: Prompt) -> str:
        """The prompt as text for the tokenizer, with the image tokens of each image."""
        if prompt.text is not None:
            image_text = self.tokens_to_text("vision_start_token_id", "image_token_id", "vision_end_token_id")
            text = prompt.text.replace(IMAGE_PLACEHOLDER, image_text)
        else:
            turns = [{"role": turn.role, "content": _parts(turn.content)} for turn in prompt.messages]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        before, *after = text.split(self.tokens_to_text("image_token_id"))
        if len(after) != len(prompt.images):
            raise NpoError(
                f"prompt {prompt.prompt_id} has {len(prompt.images)} images, but its text after the chat template has "
                f"{len(after)} placeholders",
                f"remove {self.tokens_to_text('image_token_id')} from the text, or use the model's own chat template",
            )
        token = self.tokens_to_text("image_token_id")
        return before + "".join(
            token * self.num_tokens(ref, prompt) + rest for ref, rest in zip(prompt.images, after, strict=True)
        )

    def tokens_to_text(self, *names: str) -> str:
        """The text of tokens that the model's config names."""
        return "".join(self.tokenizer.convert_ids_to_tokens([getattr(self.config, name) for name in names]))

    def num_tokens(self, ref: ImageRef, prompt: Prompt) -> int:
        """Number of image tokens of an image."""
        try:
            num_patches = self.processor.get_number_of_image_patches(ref.height, ref.width, {})
        except ValueError as error:
            raise NpoError(
                f"prompt {prompt.prompt_id}, {ref.location}: size {ref.width} x {ref.height} is not supported: {error}",
                "crop the image, or remove the row",
            ) from error
        return num_patches // self.processor.merge_size**2

    def build_inputs(self, ids_BL: Tensor, images: Sequence[RowImages]) -> dict[str, Tensor]:
        """Model inputs besides the token ids, for rows with these images; empty without images.

        `mm_token_type_ids` is 1 at image tokens: transformers computes their positions from rows and columns.
        """
        patches = [self.load_patches(ref) for row in images for ref in row]
        if not patches:
            return {}
        device = ids_BL.device
        return {
            "pixel_values": torch.cat([each.patches for each in patches]).to(device),
            "image_grid_thw": torch.cat([each.grid_13 for each in patches]).to(device),
            "mm_token_type_ids": (ids_BL == self.image_token_id).int(),
        }

    def attach_images(self, packed: PackedRows, rows: Sequence[TokenRow]) -> PackedRows:
        """The rows with their images as model inputs."""
        inputs = self.build_inputs(packed.input_ids_BL, [row.images for row in rows])
        return replace(packed, vision_inputs=inputs, suppressed_ids=self.suppressed_ids)

    def load_patches(self, ref: ImageRef) -> ImagePatches:
        """The image's patches, from the cache or the image itself, which is checked against its digest."""
        patches = self._cache.pop(ref.sha256)
        if patches is None:
            inputs = self.processor(images=[open_image(ref)], return_tensors="pt")
            patches = ImagePatches(patches=inputs["pixel_values"], grid_13=inputs["image_grid_thw"])
        self._cache.put(ref.sha256, patches)
        return patches

    def resize_image(self, ref: ImageRef) -> "Image.Image":
        """The image in the size that the vision tower reads, resized as in `load_patches`."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        size = self.processor.size
        height, width = smart_resize(
            ref.height,
            ref.width,
            factor=self.processor.patch_size * self.processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return open_image(ref).resize((width, height), resample=self.processor.resample)

    def save(self, folder: Path) -> None:
        """Write the processor's files, unchanged."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def _parts(content: str) -> list[dict[str, str]]:
    """A message's content in the form of a vision-language chat template."""
    first, *rest = content.split(IMAGE_PLACEHOLDER)
    parts: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
    for text in rest:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts


def choose_model_class(config: PreTrainedConfig) -> type:
    """The transformers class for a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _has_vision_tower(config) else AutoModelForCausalLM


def _has_vision_tower(config: PreTrainedConfig) -> bool:
    return getattr(config, "vision_config", None) is not None


def load_vision(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vision | None:
    """The image processing of a model, from its folder or hub id; None for a text-only model."""
    source, config = model.name_or_path, model.config
    if not _has_vision_tower(config):
        return None
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise NpoError(
            f"{source}: vision-language models of type {config.model_type} are not supported (only "
            f"{', '.join(SUPPORTED_MODEL_TYPES)})",
            "choose a supported one, or a text-only model",
        )
    require_pillow()
    from transformers import AutoImageProcessor

    found = [_file(source, name) for name in PROCESSOR_FILES]
    try:
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise NpoError(
            f"{source}: no image processor could be loaded: {str(error).splitlines()[0]}",
            "add the model's preprocessor_config.json",
        ) from error
    files = {path.name: path.read_bytes() for path in found if path is not None}
    return Vision(
        config=config,
        tokenizer=tokenizer,
        processor=processor,
        files=files,
        suppressed_ids=(config.image_token_id, config.video_token_id),
    )


def _file(source: str, name: str) -> Path | None:
    found: Any = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
