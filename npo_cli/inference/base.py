"""The interface of inference engines: requests, samples, and the model as an engine sees it.

An engine is one class with a `name`, capability flags, `validate` and `status`, listed in `npo_cli.registry.ENGINES`.
The rest of the package asks for the flags, never for the name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.config.engine import EngineSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.registry import ENGINES
from npo_cli.types.rollouts import ImageRef

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One response to sample."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    slot: int
    seed: int
    """63 bits; the same request with the same weights gets the same response."""
    version: str | None = None
    """Weights to sample from, among the versions that the engine holds; None: the newest."""
    images: tuple[ImageRef, ...] = ()
    """The images behind the prompt's image tokens."""
    max_new_tokens: int | None = None
    """Limit of this response, at most that of the call; None: that of the call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobRequest:
    """One response to compute log-probabilities for."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()
    """The images behind the prompt's image tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInput:
    """Token ids of a prompt, and the images behind its image tokens."""

    token_ids: tuple[int, ...]
    images: tuple[ImageRef, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sampled response."""

    prompt_id: str
    slot: int
    response_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """Log-probability per token at the sampling temperature, under the engine's weights (nats)."""
    mean_entropy: float
    """Mean entropy per token (nats); from vLLM the mean of -log p, which has the same expectation."""
    text: str
    """Without the end token."""
    finished: bool
    """Ended by an end token, not by the length limit."""


class VisionProcessor(Protocol):
    """How images become model inputs, for a vision-language model."""

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Tokens with probability 0 under the policy."""

    @property
    def image_token_id(self) -> int:
        """The placeholder token; an image takes several of them."""

    def resize_image(self, ref: ImageRef) -> "Image.Image":
        """The image at the size that the model's vision tower reads."""

    def save(self, folder: Path) -> None:
        """Write the files of the model's processor."""

    def build_inputs(self, ids_NL: Tensor, images: Sequence[tuple[ImageRef, ...]]) -> dict[str, Tensor]:
        """Model inputs besides the token ids, for rows with these images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterHandle:
    """Access to a policy's LoRA adapters and to the frozen base they belong to."""

    max_rank: int
    """Largest rank to expect; twice the trained one where adapters are extrapolated."""
    target_modules: tuple[str, ...]
    """Last parts of the names of the adapted layers, such as `q_proj`."""
    read_base: Callable[[], Mapping[str, Tensor]]
    """The frozen weights under their Hugging Face names."""
    read_adapters: Callable[[], Mapping[str, Tensor]]
    """The current adapter tensors."""
    read_shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    """Their shapes, without the rank where the rank may change."""
    save: Callable[[Path], None]
    """Write the adapters in peft's format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelHandle:
    """The policy's model as an engine sees it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""
    pad_id: int
    max_model_len: int
    """Maximum length of prompt and response together, in tokens."""
    dtype: torch.dtype
    """Precision of the trainer's forward pass; the engine must compute in the same."""
    adapters: AdapterHandle | None = None
    """None where all weights are trained."""
    vision: VisionProcessor | None = None
    """None for a text-only model."""

    @property
    def is_on_cpu(self) -> bool:
        """Whether the weights are in CPU memory."""
        return self.model.device.type == "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """Whether an engine works on this machine."""

    kind: str
    is_available: bool
    detail: str
    hint: str = ""


class Engine:
    """Samples responses from the policy. Subclasses set the flags that apply and implement the three methods below."""

    name: ClassVar[str]
    """The value of `engine.kind`."""
    runs_in_trainer: ClassVar[bool] = True
    """Uses the trainer's process and devices; otherwise a process with devices of its own."""
    needs_weight_sync: ClassVar[bool] = True
    """Holds a copy of the weights, which is updated and verified; otherwise it samples from the trainer's own model
    (`ModelHandle.model`), and nothing is sent or verified."""
    supports_images: ClassVar[bool] = False
    serves_adapters: ClassVar[bool] = False
    """Takes LoRA adapters (`ModelHandle.adapters`) beside a base that never changes."""

    version: str | None = None
    """The `version` of the newest `update_weights`; None if the engine holds no weights."""
    num_versions: int = 1
    """Number of versions that it can hold at the same time."""
    reproducibility_warning: str = ""
    """What limits reproducibility; empty if a seed always gives the same response."""

    def __init__(self, settings: EngineSettings, handle: ModelHandle) -> None:
        """Start the engine for this model."""
        self.settings, self.handle = settings, handle

    @classmethod
    def validate(cls, settings: EngineSettings, *, uses_adapters: bool, uses_images: bool) -> None:
        """Raise `NpoError` if this engine cannot be used with these settings on this machine."""
        if uses_images and not cls.supports_images:
            raise NpoError(
                f"engine.kind={cls.name} does not support images", f"set engine.kind={_choose('supports_images')}"
            )
        if uses_adapters and not cls.serves_adapters:
            raise NpoError(
                f"engine.kind={cls.name} does not support LoRA adapters (model.lora.rank)",
                f"set engine.kind={_choose('serves_adapters')}",
            )

    @classmethod
    def status(cls, required: Mapping[str, SpecifierSet]) -> EngineStatus:
        """For `npo doctor --full`, given the version range that is required of each package."""
        return EngineStatus(kind=cls.name, is_available=True, detail="installed")

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Take over the model's current weights under this version; without a copy only the version changes."""
        if self.needs_weight_sync:
            raise NotImplementedError
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order, from softmax(logits / temperature) without truncation."""
        raise NotImplementedError

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """Log-probability per response token (nats, temperature 1) under the newest weights."""
        raise NotImplementedError

    def release_memory(self) -> None:
        """Free memory during the policy update, as far as the engine can."""

    def close(self) -> None:
        """Stop, with everything that was started. A second call does nothing."""


def _choose(flag: str) -> str:
    """Names of engines with this flag, for a hint."""
    return " or ".join(name for name in ENGINES.built_in if getattr(ENGINES.get(name), flag))


def open_engine(settings: EngineSettings, handle: ModelHandle) -> Engine:
    """The engine that `engine.kind` names, started."""
    engine: type[Engine] = ENGINES.get(settings.kind)
    engine.validate(settings, uses_adapters=handle.adapters is not None, uses_images=handle.vision is not None)
    return engine(settings, handle)


def check_samples(requests: Sequence[SampleRequest], samples: Sequence[Sample], *, kind: str) -> None:
    """Raise `RunFailed` unless there is one sample per request, in order, with one log-probability per token."""
    hint = "fix the engine: npo docs how-to/add-an-engine"
    wanted = [(request.prompt_id, request.slot) for request in requests]
    given = [(sample.prompt_id, sample.slot) for sample in samples]
    if given != wanted:
        order = " in another order" if len(given) == len(wanted) else ""
        raise RunFailed(f"engine.kind={kind} returned {len(given)} samples for {len(wanted)} requests{order}", hint)
    for request, sample in zip(requests, samples, strict=True):
        if request.max_new_tokens is not None and len(sample.response_ids) > request.max_new_tokens:
            raise RunFailed(
                f"engine.kind={kind} returned {len(sample.response_ids)} tokens for a request of at most "
                f"{request.max_new_tokens} (prompt {sample.prompt_id}, slot {sample.slot})",
                hint,
            )
        if not 0 < len(sample.response_ids) == len(sample.logps):
            raise RunFailed(
                f"engine.kind={kind} returned {len(sample.logps)} log-probabilities for {len(sample.response_ids)} "
                f"tokens (prompt {sample.prompt_id}, slot {sample.slot})",
                hint,
            )


def check_engines(required: Mapping[str, SpecifierSet]) -> list[EngineStatus]:
    """Status of every registered engine, given the version range that is required of each package."""
    found = []
    for name in ENGINES.names():
        try:
            found.append(ENGINES.get(name).status(required))
        except NpoError as error:
            found.append(EngineStatus(kind=name, is_available=False, detail=error.message, hint=error.hint))
        except ImportError as error:
            found.append(EngineStatus(kind=name, is_available=False, detail=f"cannot be imported: {error}"))
    return found
