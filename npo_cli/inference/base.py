"""What an engine is asked and what it answers, whichever engine it is.

What an engine is told of a policy that trains adapters: a frozen base, given once, and small tensors that change.

vLLM serves many adapters of one base side by side (multi-LoRA), none of them merged. This room does not know peft.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.errors import NpoError
from npo_cli.types.rollouts import ImageRef

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One response wanted."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    slot: int
    seed: int
    """63 bits; the same request with the same weights gets the same response."""
    version: str | None = None
    """Which of the weights that are held answers; None is those that were given last."""
    images: tuple[ImageRef, ...] = ()
    """What the image tokens of the prompt show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobRequest:
    """One trajectory whose log-probabilities are wanted."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()
    """What the image tokens of the prompt show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInput:
    """Tokens that an engine reads, and what the image tokens among them show."""

    token_ids: tuple[int, ...]
    images: tuple[ImageRef, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One response sampled."""

    prompt_id: str
    slot: int
    response_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """At the sampling temperature, under the engine's weights (nats)."""
    mean_entropy: float
    """Mean over the tokens of the law's entropy; of vLLM the mean of -log p, whose average over all tokens of a batch
    tends to the same figure."""
    text: str
    """Without the end token."""
    finished: bool


class VisionProcessor(Protocol):
    """How a model with a vision tower is shown pictures."""

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Tokens that the policy never writes."""

    @property
    def image_token_id(self) -> int:
        """The token that stands for a part of a picture."""

    def resize_image(self, ref: ImageRef) -> "Image.Image":
        """The picture in the size in which the model sees it."""

    def save(self, folder: Path) -> None:
        """Write the files of the model's own processor."""

    def build_inputs(self, ids_NL: Tensor, images: Sequence[tuple[ImageRef, ...]]) -> dict[str, Tensor]:
        """What the model reads beside these ids, whose rows show these pictures."""


class Engine(Protocol):
    """Anything that samples."""

    @property
    def version(self) -> str | None:
        """Which weights it holds, in the words of `take_weights`; None where it holds none that were ever given."""

    @property
    def has_own_weights(self) -> bool:
        """Whether it has weights of its own, which have to be sent and checked."""

    @property
    def num_versions(self) -> int:
        """How many weights it can hold side by side, each under the version it was given as."""

    @property
    def reproducibility_warning(self) -> str:
        """What a person should know before relying on a seed; empty where the same seed means the same response."""

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Hold the weights that the model has now, under this name."""

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample a request, in order."""

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """Log-probabilities (nats, temperature 1) of each response's tokens under the weights at hand."""

    def release_memory(self) -> None:
        """Nothing is asked for a while: give back what can be given back."""

    def close(self) -> None:
        """End, and leave nothing running. A second call does nothing."""


LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Sizes of vLLM's adapter slots: a smaller rank is padded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterHandle:
    """How the live adapters of a policy, and the base beside them, are reached."""

    max_rank: int
    """The largest they may have, here or joined with older ones."""
    target_modules: tuple[str, ...]
    """Last names of the layers that have one."""
    read_base: Callable[[], Mapping[str, Tensor]]
    """The frozen weights under their Hugging Face names."""
    read_adapters: Callable[[], Mapping[str, Tensor]]
    """The adapters as they are now."""
    read_shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    """Their shapes, but for the rank where they may be joined."""
    save: Callable[[Path], None]
    """Write them into a folder in peft's format."""


def round_up_lora_rank(rank: int) -> int:
    """The smallest slot that holds adapters of this rank."""
    for size in LORA_RANKS:
        if rank <= size:
            return size
    raise NpoError(
        f"vLLM serves adapters up to rank {LORA_RANKS[-1]}, and {rank} is asked for",
        "lower model.lora.rank (extrapolation.space=weights takes twice as much), or set engine.kind=transformers",
    )
