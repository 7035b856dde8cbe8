"""What a vision-language model reads beside its tokens: image tokens in the prompt, and the pixels behind them.

Pixels are made by transformers' Pillow processor, whatever else is installed, so that they are the same everywhere. The
number of image tokens follows from a picture's size alone: encoding a prompt opens no picture.
A policy never writes an image token: it would stand for a picture that is not there. Its law is the model's without
them, when it samples and when it is scored. Only Qwen3-VL is known here.

Axes: N rows, L positions.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import cached_file

from npo_cli.errors import NpoError
from npo_cli.images import open_image, require_pillow
from npo_cli.policy.logprobs import PackedRows, TokenRow
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, ImageRef, Prompt

if TYPE_CHECKING:
    from PIL import Image

SUPPORTED_MODEL_TYPES = ("qwen3_vl",)
"""config.model_type of the models whose inputs are made here."""
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""What a model's folder holds for its processor."""
CACHE_BYTES = 256 << 20

RowImages = tuple[ImageRef, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePatches:
    """One picture as the vision tower reads it."""

    patches: Tensor
    """Flattened, one a row."""
    grid_13: Tensor
    """Frames, rows and columns of patches."""


@dataclass(slots=True)
class PixelCache:
    """The newest pictures by digest, together below CACHE_BYTES but for the last one."""

    _held: "OrderedDict[str, ImagePatches]" = field(default_factory=OrderedDict)
    _num_bytes: int = 0

    def pop(self, digest: str) -> ImagePatches | None:
        """Out of the cache: whoever wants it kept puts it back, as the newest."""
        found = self._held.pop(digest, None)
        self._num_bytes -= 0 if found is None else found.patches.nbytes
        return found

    def put(self, digest: str, pixels: ImagePatches) -> None:
        """As the newest; the oldest make room."""
        self._held[digest] = pixels
        self._num_bytes += pixels.patches.nbytes
        while self._num_bytes > CACHE_BYTES and len(self._held) > 1:
            self._num_bytes -= self._held.popitem(last=False)[1].patches.nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Vision:
    """The eyes of a policy."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    processor: BaseImageProcessor
    files: Mapping[str, bytes]
    """The processor's own by name, which every checkpoint gets."""
    suppressed_ids: tuple[int, ...]
    """Tokens that a policy never writes."""
    _cache: "PixelCache" = field(default_factory=PixelCache)

    @property
    def image_token_id(self) -> int:
        """The token that stands for a part of a picture."""
        return self.config.image_token_id

    def render_prompt(self, prompt: Prompt) -> str:
        """The prompt as the tokenizer reads it, each mark spelled as the image tokens of its picture."""
        if prompt.text is not None:
            whole = self.tokens_to_text("vision_start_token_id", "image_token_id", "vision_end_token_id")
            text = prompt.text.replace(IMAGE_PLACEHOLDER, whole)
        else:
            turns = [{"role": turn.role, "content": _parts(turn.content)} for turn in prompt.messages]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        before, *after = text.split(self.tokens_to_text("image_token_id"))
        if len(after) != len(prompt.images):
            raise NpoError(
                f"prompt {prompt.prompt_id} has {len(prompt.images)} images, but its text and the chat template make "
                f"{len(after)} places for them",
                f"take {self.tokens_to_text('image_token_id')} out of the text, or use the model's own chat template",
            )
        token = self.tokens_to_text("image_token_id")
        return before + "".join(
            token * self.num_tokens(ref, prompt) + rest for ref, rest in zip(prompt.images, after, strict=True)
        )

    def tokens_to_text(self, *names: str) -> str:
        """Tokens that the model's config names, as text."""
        return "".join(self.tokenizer.convert_ids_to_tokens([getattr(self.config, name) for name in names]))

    def num_tokens(self, ref: ImageRef, prompt: Prompt) -> int:
        """Image tokens of a picture of that size."""
        try:
            num_patches = self.processor.get_number_of_image_patches(ref.height, ref.width, {})
        except ValueError as error:
            raise NpoError(
                f"prompt {prompt.prompt_id}, {ref.location}: {ref.width} x {ref.height} pixels cannot be read: {error}",
                "crop the picture, or remove the row",
            ) from error
        return num_patches // self.processor.merge_size**2

    def build_inputs(self, ids_NL: Tensor, images: Sequence[RowImages]) -> dict[str, Tensor]:
        """What the model wants beside these ids, whose rows show these pictures; nothing where none shows any.

        `mm_token_type_ids` is 1 where a picture stands: transformers counts positions along its rows and columns there.
        """
        shown = [self.load_patches(ref) for row in images for ref in row]
        if not shown:
            return {}
        device = ids_NL.device
        return {
            "pixel_values": torch.cat([pixels.patches for pixels in shown]).to(device),
            "image_grid_thw": torch.cat([pixels.grid_13 for pixels in shown]).to(device),
            "mm_token_type_ids": (ids_NL == self.image_token_id).int(),
        }

    def attach_images(self, packed: PackedRows, rows: Sequence[TokenRow]) -> PackedRows:
        """The same rows with what they show."""
        sights = self.build_inputs(packed.input_ids_NL, [row.images for row in rows])
        return replace(packed, vision_inputs=sights, suppressed_ids=self.suppressed_ids)

    def load_patches(self, ref: ImageRef) -> ImagePatches:
        """The picture's patches: opened, checked against its digest, and kept for a while."""
        found = self._cache.pop(ref.sha256)
        if found is None:
            made = self.processor(images=[open_image(ref)], return_tensors="pt")
            found = ImagePatches(patches=made["pixel_values"], grid_13=made["image_grid_thw"])
        self._cache.put(ref.sha256, found)
        return found

    def resize_image(self, ref: ImageRef) -> "Image.Image":
        """The picture in the size in which the tower sees it, resized as `pixels` does."""
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
        """The processor's files as they came with the model."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def _parts(content: str) -> list[dict[str, str]]:
    """A turn as the chat template of a vision-language model takes it."""
    first, *rest = content.split(IMAGE_PLACEHOLDER)
    parts: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
    for text in rest:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts


def find_model_class(source: str) -> type:
    """The transformers class that opens this folder or hub id: with the vision tower, where there is one."""
    return choose_model_class(AutoConfig.from_pretrained(source, trust_remote_code=False))


def choose_model_class(config: PreTrainedConfig) -> type:
    """The same of a config."""
    return AutoModelForImageTextToText if _has_tower(config) else AutoModelForCausalLM


def _has_tower(config: PreTrainedConfig) -> bool:
    return getattr(config, "vision_config", None) is not None


def load_vision(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vision | None:
    """The processor from where the model came from; None for a model that reads text alone."""
    source, config = model.name_or_path, model.config
    if not _has_tower(config):
        return None
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise NpoError(
            f"{source} is a vision-language model of the kind {config.model_type}; npo reads pictures for "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} only",
            "choose one of those, or a text model",
        )
    require_pillow()
    found = [_file(source, name) for name in PROCESSOR_FILES]
    try:
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise NpoError(
            f"{source}: no image processor could be loaded: {str(error).splitlines()[0]}",
            "bring the model's preprocessor_config.json",
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
