"""LoRA adapters through peft: float32 matrices beside the linear layers of a frozen base, and their checkpoints.

peft replaces the model's linear layers in place; adapters are never merged. A checkpoint is a folder in peft's format
plus one file with the base's digest. No other module uses peft. Not supported: dropout, biases, rank patterns. Adapters
are float32 even if the base is not, so that small updates are not rounded away.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.config.recipe import LoraSettings
from npo_cli.errors import NpoError, damaged_checkpoint_hint
from npo_cli.policy.weights_io import check_tensors, copy_tensors, read_saved, weights_digest

TENSORS_FILE, CONFIG_FILE, BASE_FILE = "adapter_model.safetensors", "adapter_config.json", "npo_base.json"
ADAPTER_NAME = "default"
PEFT_PREFIX = "base_model.model."
"""Prefix of tensor names in peft's files."""
BASE_LAYER_INFIX = ".base_layer."
"""Part of the name of a base weight that has an adapter."""
IGNORED_CONFIG_KEYS = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision"})
"""Entries of adapter_config.json that do not affect the adapters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """The adapters of a policy, and their base."""

    config: Mapping[str, Any]
    """Content of adapter_config.json."""
    rank: int
    base_path: str
    """The recipe's model.path."""
    base_digest: str
    """sha256 of the base's weights, in their precision."""


def attach_adapters(model: PreTrainedModel, settings: LoraSettings, *, path: str) -> AdapterInfo:
    """Add adapters to the model's layers, in place, and freeze the rest. Before training they change nothing:

    A is initialized from its own seed, B is 0.
    """
    if find_spec("peft") is None:
        raise NpoError(
            f"model.lora.rank={settings.rank} needs peft, which is not installed", "pip install 'peft>=0.21,<0.22'"
        )
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    assert settings.rank is not None, "LoRA is disabled"
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=resolve_target_modules(model, settings.targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
        inference_mode=False,
    )
    digest = weights_digest(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    cast_adapter_dtype(model, ADAPTER_NAME)
    plain = json.loads(json.dumps(config.to_dict(), default=sorted)) | {"inference_mode": True}
    return AdapterInfo(config=plain, rank=settings.rank, base_path=path, base_digest=digest)


def resolve_target_modules(model: PreTrainedModel, targets: tuple[str, ...]) -> list[str]:
    """Names of linear layers (their last parts). An unknown name is an error; peft would ignore it.

    Without names: all linear layers of the language model, none of a vision tower.
    """
    head = model.get_output_embeddings()
    linear = [module for module in model.named_modules() if isinstance(module[1], torch.nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name, module in linear if module is not head})
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise NpoError(
            f"model.lora.targets: this model has no linear layer named {unknown[0]} (the LM head cannot be a target)",
            f"choose among {', '.join(known)}, or leave it empty for all",
        )
    language = {module for module in model.get_decoder().modules()}
    return sorted(set(targets)) or sorted({name.rpartition(".")[2] for name, module in linear if module in language})


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's adapter tensors (not copies) under the names in peft's files."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    return {PEFT_PREFIX + name: tensor for name, tensor in own.items()}


def base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The base weights under their names without adapters."""
    adapters = {
        name.replace(".weight", f".{ADAPTER_NAME}.weight").removeprefix(PEFT_PREFIX) for name in adapter_tensors(model)
    }
    own = model.state_dict()
    return {name.replace(BASE_LAYER_INFIX, "."): tensor for name, tensor in own.items() if name not in adapters}


def share_base_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Make two models of one base share the frozen weights, to save memory."""
    parameters, base = dict(model.named_parameters()), dict(other.named_parameters())
    for name in parameters.keys() & base.keys():
        if f".{ADAPTER_NAME}." not in name:
            parameters[name].data = base[name].data


def shapes_without_rank(own: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes without the rank: the input size of A, the output size of B."""
    return {name: (tensor.shape[1 if is_lora_A(name) else 0],) for name, tensor in own.items()}


def is_lora_A(name: str) -> bool:
    """Whether a tensor is a matrix A (rank x in) or B (out x rank)."""
    return ".lora_A." in name


def save_adapters(own: Mapping[str, Tensor], adapters: AdapterInfo, folder: Path) -> None:
    """Write a folder in peft's format, with the digest of the base; `own` are unsharded adapters.

    Extrapolated adapters have another rank; alpha is scaled so that alpha / rank stays the same.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in own.items()}
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    rank = next(tensor.shape[0] for name, tensor in own.items() if is_lora_A(name))
    config = dict(adapters.config)
    if rank != adapters.rank:
        config |= {"r": rank, "lora_alpha": config["lora_alpha"] * rank / adapters.rank}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
    base = {"path": adapters.base_path, "digest": adapters.base_digest}
    (folder / BASE_FILE).write_text(json.dumps(base))


def read_base_digest(folder: Path) -> str:
    """Digest of the base of a folder's adapters."""
    return str(_read(folder / BASE_FILE, folder)["digest"])


def load_adapters(model: PreTrainedModel, adapters: AdapterInfo, folder: Path) -> None:
    """Copy a folder's adapters into the model; if base, config or tensors differ, the model is unchanged."""
    copy_tensors(adapter_tensors(model), read_fitting_adapters(model, adapters, folder))


def read_fitting_adapters(model: PreTrainedModel, adapters: AdapterInfo, folder: Path) -> dict[str, Tensor]:
    """A folder's adapters, after a check that base, config and tensors match the model's."""
    saved = read_saved(folder, TENSORS_FILE)
    _check_base(adapters, folder)
    _check_config(adapters, folder)
    check_tensors(adapter_tensors(model), saved.tensors, folder, bad_values=saved.bad_values)
    return dict(saved.tensors)


def _check_base(adapters: AdapterInfo, folder: Path) -> None:
    base = _read(folder / BASE_FILE, folder)
    if base.get("digest") != adapters.base_digest:
        raise NpoError(
            f"{folder}: the adapters belong to another base than {adapters.base_path}: to {base.get('path')} with the "
            f"weights {str(base.get('digest'))[:12]}, not {adapters.base_digest[:12]}",
            "set model.path and model.dtype to those of that base",
        )


def _check_config(adapters: AdapterInfo, folder: Path) -> None:
    saved = _read(folder / CONFIG_FILE, folder)
    saved = {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in saved.items()}
    # Keys that only one version of peft writes are not compared.
    both = sorted((adapters.config.keys() & saved.keys()) - IGNORED_CONFIG_KEYS)
    differing = [name for name in both if saved[name] != adapters.config[name]]
    if differing or not {"r", "lora_alpha", "target_modules"} <= set(both):
        shown = ", ".join(f"{name} {saved[name]} instead of {adapters.config[name]}" for name in differing[:3])
        raise NpoError(
            f"{folder}: the adapters have {shown or 'no rank, alpha or targets'}",
            "set model.lora as it was when they were trained",
        )


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NpoError(f"{path} cannot be read: {error}", damaged_checkpoint_hint(folder)) from error
    if not isinstance(content, dict):
        raise NpoError(f"{path} is not a JSON object", damaged_checkpoint_hint(folder))
    return content


@contextmanager
def disable_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Compute with the base alone during the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
