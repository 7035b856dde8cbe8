"""What an engine is told of a policy that trains adapters: a frozen base, given once, and small tensors that change.

vLLM serves many adapters of one base side by side (multi-LoRA), none of them merged. This room does not know peft.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from npo_cli.errors import NpoError

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
