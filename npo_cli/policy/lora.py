"""LoRA through peft: small float32 matrices beside the linear layers of a frozen base, and their folders.

The model stays the Hugging Face one: peft replaces its linear layers in place, and nothing is ever merged. A
checkpoint is the folder that peft writes, plus one file that says which base it belongs to. No other file knows peft.
Left out: dropout, biases, rank patterns. Adapters are float32 even where the base is not, so no step is rounded away.
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
from npo_cli.policy.weights_io import check_tensors, copy_tensors, read_tensors, weights_digest

TENSORS_FILE, CONFIG_FILE, BASE_FILE = "adapter_model.safetensors", "adapter_config.json", "npo_base.json"
ADAPTER_NAME = "default"
PEFT_PREFIX = "base_model.model."
"""Before every tensor's name in peft's files."""
BASE_LAYER_INFIX = ".base_layer."
"""In the name of a weight of the base, where peft put an adapter beside it."""
IGNORED_CONFIG_KEYS = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision"})
"""Entries of a config that do not change what the adapters do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """What was put beside the layers of a base."""

    config: Mapping[str, Any]
    """As peft writes it into adapter_config.json."""
    rank: int
    base_path: str
    """model.path of the recipe."""
    base_digest: str
    """sha256 of the base's weights, in the precision in which they are held."""


def attach_adapters(model: PreTrainedModel, settings: LoraSettings, *, path: str) -> AdapterInfo:
    """Put adapters beside the model's layers, in place, and freeze the rest; as a function the model stays what it was.

    A is drawn from a stream of its own, B is 0.
    """
    if find_spec("peft") is None:
        raise NpoError(
            f"model.lora.rank={settings.rank} needs peft, which is not installed", "pip install 'peft>=0.21,<0.22'"
        )
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    assert settings.rank is not None, "LoRA is off"
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


def resolve_target_modules(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """Last names of linear layers; an unknown one is refused (peft would take the others without a word).

    Where none is named: all of the language model's, none of a vision tower's.
    """
    head = model.get_output_embeddings()
    linear = [module for module in model.named_modules() if isinstance(module[1], torch.nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name, module in linear if module is not head})
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise NpoError(
            f"model.lora.targets: this model has no linear layer named {unknown[0]} (the head is no target)",
            f"choose among {', '.join(known)}, or leave it empty for all of them",
        )
    language = {module for module in model.get_decoder().modules()}
    return sorted(set(wanted)) or sorted({name.rpartition(".")[2] for name, module in linear if module in language})


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The live adapters under the names of peft's files: who writes into them changes the model."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    return {PEFT_PREFIX + name: tensor for name, tensor in own.items()}


def base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The frozen weights under the names that they had before any adapter stood beside them."""
    adapters = {
        name.replace(".weight", f".{ADAPTER_NAME}.weight").removeprefix(PEFT_PREFIX) for name in adapter_tensors(model)
    }
    own = model.state_dict()
    return {name.replace(BASE_LAYER_INFIX, "."): tensor for name, tensor in own.items() if name not in adapters}


def share_base_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Let the frozen weights of a model be those of another of the same base: both then take the room of one."""
    parameters, base = dict(model.named_parameters()), dict(other.named_parameters())
    for name in parameters.keys() & base.keys():
        if f".{ADAPTER_NAME}." not in name:
            parameters[name].data = base[name].data


def shapes_without_rank(own: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What a layer reads, or writes, by the names of peft's files: shapes but for the rank."""
    return {name: (tensor.shape[1 if is_lora_A(name) else 0],) for name, tensor in own.items()}


def is_lora_A(name: str) -> bool:
    """Whether it is a matrix A, (rank, in), or a B, (out, rank)."""
    return ".lora_A." in name


def save_adapters(own: Mapping[str, Tensor], adapters: AdapterInfo, folder: Path) -> None:
    """A folder as peft's own, and beside it which base it needs; `own` are whole adapters under the names there.

    Joined ones have another rank, and an alpha that leaves alpha / rank what it is.
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
    """Digest of the base that a folder's adapters were trained beside."""
    return str(_read(folder / BASE_FILE, folder)["digest"])


def load_adapters(model: PreTrainedModel, adapters: AdapterInfo, folder: Path) -> None:
    """Copy a folder's adapters into the model; it is untouched where base, config or tensors are others."""
    copy_tensors(adapter_tensors(model), read_fitting_adapters(model, adapters, folder))


def read_fitting_adapters(model: PreTrainedModel, adapters: AdapterInfo, folder: Path) -> dict[str, Tensor]:
    """A folder's adapters, which belong to this base and fit the model's one to one."""
    tensors = read_tensors(folder, TENSORS_FILE)
    _refuse_other_base(adapters, folder)
    _refuse_other_config(adapters, folder)
    check_tensors(adapter_tensors(model), tensors, folder)
    return tensors


def _refuse_other_base(adapters: AdapterInfo, folder: Path) -> None:
    said = _read(folder / BASE_FILE, folder)
    if said.get("digest") != adapters.base_digest:
        raise NpoError(
            f"{folder}: these adapters belong to another base than {adapters.base_path}: they were trained beside "
            f"{said.get('path')} with the weights {str(said.get('digest'))[:12]}, not {adapters.base_digest[:12]}",
            "set model.path to that base, and model.dtype as it was",
        )


def _refuse_other_config(adapters: AdapterInfo, folder: Path) -> None:
    said = _read(folder / CONFIG_FILE, folder)
    told = {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in said.items()}
    # What a newer or older peft writes on top is not compared.
    both = sorted((adapters.config.keys() & told.keys()) - IGNORED_CONFIG_KEYS)
    differing = [name for name in both if told[name] != adapters.config[name]]
    if differing or not {"r", "lora_alpha", "target_modules"} <= set(both):
        shown = ", ".join(f"{name} {told[name]} instead of {adapters.config[name]}" for name in differing[:3])
        raise NpoError(
            f"{folder}: these adapters have {shown or 'no rank, alpha or targets'}",
            "model.lora must be as it was when they were trained",
        )


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NpoError(f"{path} cannot be read: {error}", damaged_checkpoint_hint(folder)) from error
    if not isinstance(found, dict):
        raise NpoError(f"{path} is no JSON object", damaged_checkpoint_hint(folder))
    return found


@contextmanager
def disable_adapters(model: PreTrainedModel) -> Iterator[None]:
    """The base as it was before any adapter stood beside it, for as long as the block runs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
