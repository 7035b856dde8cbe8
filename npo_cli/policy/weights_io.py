"""Load a checkpoint's weights into a model, with nothing missing, extra, of another shape, or not finite.

`from_pretrained` only warns about a missing tensor and fills it with random numbers. Here every tensor is checked
before the first one is copied.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.errors import NpoError, damaged_checkpoint_hint


def read_tensors(folder: Path, pattern: str = "model*.safetensors") -> dict[str, Tensor]:
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


def tied_names(model: PreTrainedModel) -> list[set[str]]:
    """Sets of names that share one storage, such as embedding and head of a tied model."""
    by_storage: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_storage.setdefault(tensor.data_ptr(), set()).add(name)
    return [names for names in by_storage.values() if len(names) > 1]


def check_tensors(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path, *, tied: Sequence[set[str]] = ()
) -> None:
    """Raise unless the tensors match the model's own one to one; of tied names one is enough."""
    optional = {name for names in tied if names & tensors.keys() for name in names}
    missing = sorted(own.keys() - tensors.keys() - optional)
    extra = sorted(tensors.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    kinds = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    findings = {"missing": missing, "extra": extra, "of another shape": shapes, "of whole numbers": kinds}
    _raise_for(findings | {"not finite": _not_finite(tensors)}, folder, damaged_checkpoint_hint(folder))


def check_loaded_weights(
    model: PreTrainedModel, *, missing: Collection[str], misshapen: Collection[tuple], source: str
) -> None:
    """Raise if a base model has missing, mismatched or non-finite tensors."""
    findings = {"missing": sorted(missing), "of another shape": sorted(name for name, *_ in misshapen)}
    hint = "set model.path to a complete causal language model"
    _raise_for(findings | {"not finite": _not_finite(model.state_dict())}, source, hint)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())


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
    tensors = read_tensors(folder)
    check_tensors(model.state_dict(), tensors, folder, tied=tied)
    return tensors


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names, in place."""
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


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
