"""Weights that other trainers saved in shards, read as whole tensors on the CPU by one process.

Two formats: torch.distributed.checkpoint (DCP; prime-rl, accelerate), and verl's file per rank with FSDP's DTensors.
Both contain pickles. Those of tensors are read by torch.load with weights_only, DCP's `.metadata` by an unpickler that
knows only the records it consists of, so that nothing in them can run code.
"""

import logging
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard

from npo_cli.errors import NpoError, first_line

DCP_METADATA = ".metadata"
"""Written last: a folder that has it is complete."""
DCP_PREFIXES = ("app.model.", "model.")
"""What stands before the model's own names: in prime-rl, in accelerate."""
RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
METADATA_CLASSES = frozenset(
    {
        *((dcp.metadata.__name__, name) for name in (*dcp.metadata.__all__, "_MEM_FORMAT_ENCODING")),
        (dcp.filesystem.__name__, "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
    }
)
COMPLETE_HINT = "copy the whole folder again, or import without this step"


def _get_member(of: Any, name: str) -> Enum:
    """A member of an enumeration, which Python up to 3.11.3 pickles as a call of getattr."""
    if not (isinstance(of, type) and issubclass(of, Enum) and name in of.__members__):
        raise pickle.UnpicklingError(f"getattr(..., {name!r}) is no part of DCP's metadata")
    return of[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the records of a DCP folder's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":  # the second in Python 3.13
            return PosixPath
        if (module, name) == ("builtins", "getattr"):
            return _get_member
        raise pickle.UnpicklingError(f"{module}.{name} is no part of DCP's metadata")


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / DCP_METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_dcp_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors by their own names; optimizer state and progress are not read."""
    reader = _Reader(folder)
    try:
        found = reader.read_metadata().state_dict_metadata
        prefix = next((each for each in DCP_PREFIXES if any(name.startswith(each) for name in found)), "")
        whole = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in found.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(whole, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception, and wraps that of a rank
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        raise NpoError(f"{folder} cannot be read: {first_line(error)[:200]}", COMPLETE_HINT) from error
    return _without_adapters({name.removeprefix(prefix): tensor for name, tensor in whole.items()}, folder)


def find_rank_files(folder: Path) -> list[Path]:
    """verl's files of the largest number of ranks, by rank; empty unless all are there."""
    named = [(match, path) for path in folder.glob("model_world_size_*.pt") if (match := RANK_FILE.match(path.name))]
    size = max((int(match[1]) for match, _ in named), default=0)
    by_rank = {int(match[2]): path for match, path in named if int(match[1]) == size}
    return [by_rank[rank] for rank in range(size)] if by_rank.keys() == set(range(size)) else []


def read_rank_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors, put together from the shards of all ranks."""
    files = find_rank_files(folder)
    logging.disable(logging.WARNING)  # torch warns that the mesh of a DTensor has no processes here
    try:
        ranks = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
        whole = {name: _assemble([rank[name] for rank in ranks]) for name in ranks[0]}
    except Exception as error:  # FSDP1's ShardedTensor is refused by weights_only
        raise NpoError(
            f"{folder}: {files[0].name} and the other ranks' cannot be read: {first_line(error)[:200]}",
            f"python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir {folder}/huggingface",
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return _without_adapters(whole, folder)


def _assemble(pieces: Sequence[Tensor]) -> Tensor:
    """One tensor from every rank's piece of it; a plain tensor is whole on every rank."""
    first = pieces[0]
    if not isinstance(first, DTensor):
        return first.clone()
    local = [piece.to_local() for piece in pieces]

    def join(mesh: Tensor, placements: Sequence[Any]) -> Tensor:
        if mesh.ndim == 0:
            return local[int(mesh)]
        if type(placements[0]) is Replicate:
            return join(mesh[0], placements[1:])
        if type(placements[0]) is Shard:
            return torch.cat([join(part, placements[1:]) for part in mesh], dim=placements[0].dim)
        raise ValueError(f"placement {placements[0]} is not supported")

    whole = join(first.device_mesh.mesh, first.placements).clone()
    if whole.shape != first.shape:
        raise ValueError(f"shards give {tuple(whole.shape)} for a tensor of {tuple(first.shape)}")
    return whole


def _without_adapters(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    if any("lora_" in name for name in tensors):
        raise NpoError(
            f"{folder} holds LoRA adapters in shards, which are not supported",
            "export them with their trainer as adapter_model.safetensors, or merge them into the base",
        )
    return dict(tensors)
