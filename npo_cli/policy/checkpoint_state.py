"""The files of a training state's tensors: one from a single process, and one more a process where several wrote.

torch's distributed checkpoint does it, in the safetensors format: beside optimizer.safetensors lies a file a process,
and its header says where in the whole each piece belongs. A whole tensor is the case of one piece, so the same reader
takes what a single process wrote. Imports of torch's distributed checkpoint wait inside.
"""

import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.policy.fsdp import is_shard

STATE_FILE = "optimizer.safetensors"
SHARD_GLOB = "shard-*.safetensors"


def has_shards(folder: Path) -> bool:
    """Whether several processes wrote this training state."""
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
    with warnings.catch_warnings():
        # That there is one process only is no news.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        checkpoint.load(wanted, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    return wanted


def read_shards(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The moments of a model in shards: of each whole one on the disk, this process's part."""
    sizes, wanted = _sizes(folder), {}
    for name, parameter in model.named_parameters():
        for key, (size, dtype) in sizes.items():
            if key.rpartition(".")[0] == name and size == parameter.shape:
                wanted[key] = torch.zeros_like(parameter, dtype=dtype)
    # How many steps each parameter has made is a number, which nobody cuts.
    return _filled(folder, wanted) | read_small_tensors(folder, end=".step")


def save_shards(folder: Path, shards: dict[str, Tensor]) -> None:
    """This process's file, beside those of the others."""
    from torch.distributed import checkpoint

    checkpoint.save(shards, storage_writer=checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True))
