"""Load a checkpoint's weights into a model, with nothing missing, extra, of another shape, or not finite.

`from_pretrained` only warns about a missing tensor and fills it with random numbers. Here every tensor is checked
before the first one is copied.
"""

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.errors import NpoError, damaged_checkpoint_hint

MAX_WEIGHT = 1e10
"""Larger weights, such as 1e30, come from damage: their products overflow."""


MAX_HELD_BYTES = 2_000_000_000
MODEL_FILES = "model*.safetensors"
INTEGER_TYPES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"})
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")


def read_tensors(folder: Path, pattern: str = MODEL_FILES) -> dict[str, Tensor]:
    """All tensors in the folder's files that match the pattern."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise NpoError(f"{folder} has no {pattern}", damaged_checkpoint_hint(folder))
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise NpoError(f"{file} cannot be read: {error}", damaged_checkpoint_hint(folder)) from error
    return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedTensors:
    """What a checkpoint folder holds."""

    tensors: Mapping[str, Tensor]
    bad_values: Mapping[str, Sequence[str]]
    """Names of tensors with values that no trained weight has."""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


FileStates: TypeAlias = tuple[tuple[str, int, int, int], ...]


class HeldWeights:
    """Folders that were read and checked, by the state of their files; of several the ones used last, up to 2 GB. Safe
    to use from several threads."""

    def __init__(self) -> None:
        self.found: OrderedDict[tuple[Path, FileStates], SavedTensors] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, folder: Path, pattern: str) -> SavedTensors:
        """What is held of these files, read where they are not the same ones."""
        with self._lock:
            return self._read(folder, pattern)

    def _read(self, folder: Path, pattern: str) -> SavedTensors:
        stats = [(path.name, path.stat()) for path in sorted(folder.glob(pattern))]
        key = folder, tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
        if key not in self.found:
            self.found[key] = _read_saved(folder, pattern)
        self.found.move_to_end(key)
        while len(self.found) > 1 and sum(saved.num_bytes for saved in self.found.values()) > MAX_HELD_BYTES:
            self.found.popitem(last=False)
        return self.found[key]


_held: HeldWeights | None = None


@contextmanager
def hold_weights() -> Iterator[None]:
    """Within the block, weights that are loaded into a model again and again are read and checked once."""
    global _held
    before = _held
    _held = before or HeldWeights()
    try:
        yield
    finally:
        _held = before


def read_saved(folder: Path, pattern: str = MODEL_FILES) -> SavedTensors:
    """The folder's tensors and what is wrong with their values; not to be changed, they may be held."""
    return _read_saved(folder, pattern) if _held is None else _held.read(folder, pattern)


def _read_saved(folder: Path, pattern: str) -> SavedTensors:
    tensors = read_tensors(folder, pattern)
    return SavedTensors(tensors=tensors, bad_values=_bad_values(tensors))


def tied_names(model: PreTrainedModel) -> list[set[str]]:
    """Sets of names that share one storage, such as embedding and head of a tied model."""
    by_storage: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_storage.setdefault(tensor.data_ptr(), set()).add(name)
    return [names for names in by_storage.values() if len(names) > 1]


def check_tensors(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    tied: Sequence[set[str]] = (),
    bad_values: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raise unless the tensors match the model's own one to one; of tied names one is enough.

    `bad_values`: what is known of their values; None: they are looked at.
    """
    optional = {name for names in tied if names & tensors.keys() for name in names}
    missing = sorted(own.keys() - tensors.keys() - optional)
    extra = sorted(tensors.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    kinds = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    findings = {"missing": missing, "extra": extra, "of another shape": shapes, "of whole numbers": kinds}
    bad_values = _bad_values(tensors) if bad_values is None else bad_values
    _raise_for({**findings, **bad_values}, folder, damaged_checkpoint_hint(folder))


def check_loaded_weights(
    model: PreTrainedModel, *, missing: Collection[str], misshapen: Collection[tuple], source: str
) -> None:
    """Raise if a base model has missing, mismatched or non-finite tensors."""
    findings = {"missing": sorted(missing), "of another shape": sorted(name for name, *_ in misshapen)}
    hint = "set model.path to a complete causal language model"
    _raise_for(findings | _bad_values(model.state_dict()), source, hint)


def _bad_values(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of tensors with values that are not finite, or larger than any trained weight."""
    floats = {name: tensor for name, tensor in sorted(tensors.items()) if tensor.is_floating_point() and tensor.numel()}
    largest = {name: _largest(tensor) for name, tensor in floats.items()}
    return {
        "not finite": [name for name, value in largest.items() if not math.isfinite(value)],
        f"with values above {MAX_WEIGHT:g}": [name for name, value in largest.items() if value > MAX_WEIGHT],
    }


def _largest(tensor: Tensor) -> float:
    """Largest absolute value; NaN if there is one."""
    low, high = torch.aminmax(tensor.detach())
    return float(torch.maximum(low.abs(), high.abs()))


def read_safetensors_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a file, from its header: no weights are read."""
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}


def check_weight_files(folder: Path) -> int:
    """Number of weights in the folder; raise for no safetensors, integer weights, or the config of a deeper model.

    A file has at least one tensor per layer; the names of tensors differ between versions of transformers. config.json
    is read as plain data: transformers makes a list as long as the number of layers.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        has_pickle = any(folder.glob("*.bin"))
        raise NpoError(
            f"{folder} has no model.safetensors" + (", only .bin files, which can run code" if has_pickle else ""),
            "save the model with save_pretrained of transformers 5 (safetensors), or choose another model.path",
        )
    header: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        try:
            header |= read_safetensors_header(file)
        except (SafetensorError, OSError) as error:
            hint = "restore it from a copy of the model"
            raise NpoError(f"{folder}: no weights could be read from {file.name}: {error}", hint) from error
    integers = [name for name, (dtype, _) in header.items() if name.endswith("weight") and dtype in INTEGER_TYPES]
    _raise_for({"of whole numbers": integers}, folder, "set model.path to a model that is not quantized")
    num_layers = _read_num_layers(folder / "config.json")
    if num_layers > len(header):
        raise NpoError(
            f"{folder / 'config.json'} describes {num_layers} layers, but the weights have only {len(header)} tensors",
            "restore config.json from a copy of the model",
        )
    return sum(math.prod(shape) for _, shape in header.values())


def _read_num_layers(path: Path) -> int:
    """The largest number of layers in a config; 0 where there is none, which transformers reports better."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return 0
    sections = [found, *found.values()] if isinstance(found, dict) else []
    values = [each.get(key) for each in sections if isinstance(each, dict) for key in NUM_LAYERS_KEYS]
    return max((value for value in values if isinstance(value, int)), default=0)


def _raise_for(findings: Mapping[str, Sequence[str]], source: Path | str, hint: str) -> None:
    for what, names in findings.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise NpoError(f"{source}: tensor {what}: {shown}", hint)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the folder's weights into the model in place; if they do not match, the model is unchanged."""
    copy_tensors(model.state_dict(), read_fitting_weights(model, folder, tied=tied_names(model)))


def read_fitting_weights(model: PreTrainedModel, folder: Path, *, tied: Sequence[set[str]]) -> dict[str, Tensor]:
    """The folder's weights, after a check that they match the model's."""
    saved = read_saved(folder)
    check_tensors(model.state_dict(), saved.tensors, folder, tied=tied, bad_values=saved.bad_values)
    return dict(saved.tensors)


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names, in place."""
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory; names that share a tensor share its copy."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        if key not in copies or not tensor.numel():
            copies[key] = torch.empty_like(tensor, device="cpu").copy_(tensor.detach())
        found[name] = copies[key]
    return found


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 of all tensors in name order: identifies the weights, whatever file they come from."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
