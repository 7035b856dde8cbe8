"""What `npo plan` says: what a model is made of, where its bytes go, what fits, and what would make it fit."""

from dataclasses import dataclass
from typing import Literal

Location = Literal["gpu", "engine gpu", "host", "disk"]
MemoryPhase = Literal["always", "sampling", "update", "saving"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model without its weights. Parameters are counted, and so is what autograd saves of one token."""

    num_params: int
    num_lora_params: int
    """Parameters of LoRA's adapters; 0 where every weight is trained."""
    adafactor_floats: int
    """Rows, columns and vectors that Adafactor keeps of what is trained."""
    largest_block_params: int
    """Parameters of the largest part that FSDP2 gathers at once."""
    root_params: int
    """Parameters of embedding, head and last norm, gathered with the root."""
    hidden_size: int
    vocab_size: int
    kv_cache_floats: int
    """Keys and values of one token in all layers."""
    activation_bytes: float
    """Activations saved for the backward pass, of one token."""
    checkpointed_activation_bytes: float
    """The same with gradient checkpointing: inputs of the layers alone."""
    layer_activation_bytes: float
    """Of one layer, saved again while it is recomputed."""
    vision_activation_bytes: float
    """Activations that the vision tower saves of one image token; 0 without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The machine that is planned for. Sizes in bytes; None is no limit."""

    num_gpus: int
    gpu_bytes: int
    host_bytes: int | None = None
    disk_bytes: int | None = None
    gpus_per_machine: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One thing that takes room: on each GPU, on each machine, or on the disk."""

    location: Location
    phase: MemoryPhase
    label: str
    num_bytes: int
    formula: str
    """The product behind the figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakUsage:
    """The largest need of one place."""

    location: Location
    peak_phase: MemoryPhase
    num_bytes: int
    limit_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether the need stays within the limit."""
        return self.limit_bytes is None or self.num_bytes <= self.limit_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingChange:
    """One setting, and what the place would need with it."""

    setting: str
    location: Location
    num_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceNeed:
    """What a run needs of this machine's memory or disk."""

    name: str
    location: Location
    num_bytes: int
    limit_bytes: int | None
    hint: str = ""
    """Where it does not fit: a setting with which it does."""

    @property
    def fits(self) -> bool:
        """Whether the need stays within the limit."""
        return self.limit_bytes is None or self.num_bytes <= self.limit_bytes
