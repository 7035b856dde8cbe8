"""Weights from a checkpoint folder into a live model, with nothing missing, extra, misshapen or not finite.

`from_pretrained` fills a missing tensor with random numbers and only warns; a guide like that still answers.
Here every tensor is accounted for before the first one is copied.
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
    """All tensors of the folder's files of that name."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise NpoError(f"{folder} holds no {pattern}", damaged_checkpoint_hint(folder))
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise NpoError(f"{file} cannot be read: {error}", damaged_checkpoint_hint(folder)) from error
    return tensors


def tied_names(model: PreTrainedModel) -> list[set[str]]:
    """Names that share one storage, such as embedding and head of a tied model: any one of them is enough."""
    by_storage: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_storage.setdefault(tensor.data_ptr(), set()).add(name)
    return [names for names in by_storage.values() if len(names) > 1]


def check_tensors(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path, *, tied: Sequence[set[str]] = ()
) -> None:
    """Refuse tensors that do not fit our own one to one; names the first few that differ.

    Of names that are tied one is enough.
    """
    excused = {name for names in tied if names & tensors.keys() for name in names}
    missing = sorted(own.keys() - tensors.keys() - excused)
    extra = sorted(tensors.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    kinds = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    findings = {"missing": missing, "extra": extra, "of another shape": shapes, "of whole numbers": kinds}
    _refuse(findings | {"not finite": _not_finite(tensors)}, folder, damaged_checkpoint_hint(folder))


def check_loaded_weights(
    model: PreTrainedModel, *, missing: Collection[str], misshapen: Collection[tuple], source: str
) -> None:
    """Refuse a base model of which transformers had to make up a part, or that holds no numbers."""
    findings = {"missing": sorted(missing), "of another shape": sorted(name for name, *_ in misshapen)}
    mend = "set model.path to a whole causal language model"
    _refuse(findings | {"not finite": _not_finite(model.state_dict())}, source, mend)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())


def _refuse(findings: Mapping[str, Sequence[str]], source: Path | str, mend: str) -> None:
    for what, names in findings.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise NpoError(f"{source}: tensor {what}: {shown}", mend)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the folder's weights into the model in place; the model is untouched when they do not fit."""
    copy_tensors(model.state_dict(), read_fitting_weights(model, folder, tied=tied_names(model)))


def read_fitting_weights(model: PreTrainedModel, folder: Path, *, tied: Sequence[set[str]]) -> dict[str, Tensor]:
    """The folder's weights, which fit the model one to one."""
    tensors = read_tensors(folder)
    check_tensors(model.state_dict(), tensors, folder, tied=tied)
    return tensors


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Values into the tensors of the same names, in place."""
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 over the bytes of all tensors in name order: which policy this is, whatever file it came from."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors under the names that they have in a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
