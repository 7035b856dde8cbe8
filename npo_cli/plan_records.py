"""What `npo plan` says: what a model is made of, where its bytes go, what fits, and what would make it fit."""

from dataclasses import dataclass
from typing import Literal

Where = Literal["gpu", "engine gpu", "host", "disk"]
Phase = Literal["always", "sampling", "update", "saving"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model without its weights. Parameters are counted, and so is what autograd saves of one token."""

    num_params: int
    num_adapters: int
    """Parameters of LoRA's adapters; 0 where every weight is trained."""
    adafactor_floats: int
    """Rows, columns and vectors that Adafactor keeps of what is trained."""
    largest_block: int
    """Parameters of the largest part that FSDP2 gathers at once."""
    outside_blocks: int
    """Parameters of embedding, head and last norm, gathered with the root."""
    hidden: int
    vocab: int
    cache_floats: int
    """Keys and values of one token in all layers."""
    saved_bytes: float
    """Activations saved for the backward pass, of one token."""
    checkpointed_bytes: float
    """The same with gradient checkpointing: inputs of the layers alone."""
    layer_bytes: float
    """Of one layer, saved anew while it is recomputed."""
    vision_bytes: float
    """Activations that the vision tower saves of one image token; 0 without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footing:
    """The machine that is asked about. Sizes in bytes; None is no limit."""

    num_gpus: int
    gpu_bytes: int
    host_bytes: int | None = None
    disk_bytes: int | None = None
    gpus_per_machine: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """One thing that takes room: on each GPU, on each machine, or on the disk."""

    where: Where
    phase: Phase
    what: str
    num_bytes: int
    how: str
    """The product behind the figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The largest need of one place."""

    where: Where
    peak: Phase
    num_bytes: int
    limit: int | None

    @property
    def fits(self) -> bool:
        """Whether the need stays within the limit."""
        return self.limit is None or self.num_bytes <= self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One setting, and what the place would need with it."""

    setting: str
    where: Where
    num_bytes: int
    fits: bool
