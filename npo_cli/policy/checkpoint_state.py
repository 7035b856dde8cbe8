"""The tensor files of a training state: optimizer.safetensors, and beside it one shard file per rank of several.

Shards are written by torch.distributed.checkpoint in the safetensors format; a file's header says where in the whole
tensor each piece belongs. A whole tensor is one piece, so the same reader reads what a single process wrote.
torch.distributed.checkpoint is imported only where it is used.
"""

import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.distributed.process_group import current_group
from npo_cli.policy.fsdp import is_shard

STATE_FILE = "optimizer.safetensors"
SHARD_GLOB = "shard-*.safetensors"


def has_shards(folder: Path) -> bool:
    """Whether several ranks wrote this training state."""
    return any(folder.glob(SHARD_GLOB))


def read_small_tensors(folder: Path, *, start: str = "", end: str = "") -> dict[str, Tensor]:
    """Tensors of optimizer.safetensors whose names begin and end like that; the others are not read."""
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(start) and name.endswith(end)}  # noqa: SIM118


def read_full_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a training state, put together in this process."""
    tensors = load_file(folder / STATE_FILE)
    if has_shards(folder):
        sizes = {name: each for name, each in _sizes(folder).items() if name not in tensors}
        tensors |= _filled(folder, {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in sizes.items()})
    return tensors


def _sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (each.size, each.properties.dtype) for name, each in found.items()}


def _filled(folder: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values from the files into these tensors, whole ones or shards, in place."""
    from torch.distributed import checkpoint

    alone = not any(map(is_shard, wanted.values()))
    with warnings.catch_warnings(), current_group().phase("load the optimizer"):
        # That there is one process only is no news.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        group = None if alone else current_group().torch_group
        checkpoint.load(wanted, storage_reader=reader, no_dist=alone, process_group=group)
    return wanted


def read_shards(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The moments of a sharded model: this rank's part of each."""
    sizes, wanted = _sizes(folder), {}
    for name, parameter in model.named_parameters():
        for key, (size, dtype) in sizes.items():
            if key.rpartition(".")[0] == name and size == parameter.shape:
                wanted[key] = torch.zeros_like(parameter, dtype=dtype)
    # The number of steps of each parameter is not sharded.
    return _filled(folder, wanted) | read_small_tensors(folder, end=".step")


def save_shards(folder: Path, shards: dict[str, Tensor]) -> None:
    """Write this rank's file beside those of the others."""
    from torch.distributed import checkpoint

    with current_group().phase("save the optimizer"):
        checkpoint.save(
            shards,
            storage_writer=checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=current_group().torch_group,
        )
