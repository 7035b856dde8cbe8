"""A model's shape from its config alone; no weights are loaded or allocated.

The model's own code runs on tensors without data (torch's FakeTensorMode), and a hook counts what autograd saves for
the backward pass: this holds for any architecture, and for gradient checkpointing as it is implemented.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from npo_cli.config.recipe import ModelSettings
from npo_cli.policy.gguf import packaged_config
from npo_cli.policy.logprobs import mixed_precision
from npo_cli.policy.lora import resolve_target_modules
from npo_cli.policy.model_folder import MODEL_HINT, find_model, is_packaged, model_load_error
from npo_cli.policy.vision import choose_model_class
from npo_cli.types.memory import ModelShape

TRACE_TOKENS = 251
"""Length of the traced row: a prime, so that no dimension of the model equals it."""


@functools.cache
def model_shape(settings: ModelSettings) -> ModelShape:
    """Count parameters and saved activations of the recipe's model, in its precision."""
    config = model_config(settings)
    compute = getattr(torch, settings.precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = empty_model(config, settings)
        blocks = transformer_blocks(model)
        in_blocks = sum(map(num_params, blocks))
        text = config.get_text_config()
        full, checkpointed = (saved_bytes(model, compute, checkpointing=on) / TRACE_TOKENS for on in (False, True))
        trained = trainable_shapes(model, settings)
        return ModelShape(
            num_params=num_params(model),
            num_lora_params=sum(map(_size, trained)) if settings.lora.rank else 0,
            adafactor_floats=sum(map(adafactor_numel, trained)),
            largest_block_params=max(map(num_params, blocks), default=0),
            root_params=num_params(model) - in_blocks,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            kv_cache_floats=2 * text.num_hidden_layers * _kv_width(text),
            activation_bytes=full,
            checkpointed_activation_bytes=checkpointed,
            layer_activation_bytes=full / text.num_hidden_layers,
            vision_activation_bytes=vision_bytes(config, compute, checkpointing=settings.gradient_checkpointing),
        )


def model_config(settings: ModelSettings) -> PreTrainedConfig:
    """The config of a folder, a config.json, a shipped model, or a hub id."""
    if is_packaged(settings.path):
        return packaged_config(settings.path)
    path = settings.path
    source = Path(path).expanduser() if path.endswith(".json") else find_model(path)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        hint = f"{MODEL_HINT}, or a config.json"
        raise model_load_error(str(source), "no model config could be read", error, hint=hint) from error


def empty_model(config: PreTrainedConfig, settings: ModelSettings) -> PreTrainedModel:
    """The architecture without data; only under FakeTensorMode."""
    kind: Any = choose_model_class(config)
    return kind.from_config(config, dtype=getattr(torch, settings.dtype), attn_implementation=settings.attention)


def transformer_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that transformers declares as not to be split."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def num_params(module: torch.nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def trainable_shapes(model: PreTrainedModel, settings: ModelSettings) -> list[tuple[int, ...]]:
    """Shapes of the trained tensors: all parameters, or LoRA's pair of rank r per adapted layer."""
    rank = settings.lora.rank
    if rank is None:
        return [tuple(parameter.shape) for parameter in model.parameters()]
    targets = set(resolve_target_modules(model, settings.lora.targets))
    adapted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
    ]
    pairs = ([(rank, layer.in_features), (layer.out_features, rank)] for layer in adapted)
    return [shape for pair in pairs for shape in pair]


def adafactor_numel(shape: tuple[int, ...]) -> int:
    """Numbers in Adafactor's state: a row and a column per matrix, else one per weight."""
    if len(shape) < 2:
        return _size(shape)
    rest = _size(shape[:-2])
    return rest * (shape[-1] + shape[-2])


def saved_bytes(model: PreTrainedModel, compute: torch.dtype, *, checkpointing: bool) -> int:
    """Bytes that a row of `TRACE_TOKENS` tokens saves for the backward pass, weights excluded."""
    if checkpointing and not model.supports_gradient_checkpointing:
        return saved_bytes(model, compute, checkpointing=False)
    model.train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros((1, TRACE_TOKENS), dtype=torch.long)
    matrices = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.dim() == 2}

    def counts(tensor: Tensor) -> bool:
        # Excludes weights, their copies in the pass's precision, and a mask that only a traced pass creates.
        return tuple(sorted(tensor.shape)) not in matrices and tensor.shape[-2:] != (TRACE_TOKENS, TRACE_TOKENS)

    with mixed_precision(model, compute):
        return count_saved_bytes(lambda: model.base_model(input_ids=ids, use_cache=False), counts)


def count_saved_bytes(forward: Callable[[], object], counts: Callable[[Tensor], bool]) -> int:
    """Bytes of the storages that autograd saves in a pass, each counted once."""
    saved: dict[int, tuple[Any, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if counts(tensor):
            saved[storage._cdata] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for _, size in saved.values())


def vision_bytes(config: PreTrainedConfig, compute: torch.dtype, *, checkpointing: bool) -> float:
    """Bytes per image token, in closed form: attention in a tower depends on image sizes, which cannot be traced.

    A block saves about 10 h + 2 i numbers per patch (two norms and their outputs, q, k, v, the attention's output, the
    MLP's two inputs), and merge^2 patches become one token. With checkpointing each block keeps its input, and one
    block at a time the rest.
    """
    tower = getattr(config, "vision_config", None)
    names = ("depth", "hidden_size", "intermediate_size", "spatial_merge_size")
    if tower is None or not all(hasattr(tower, name) for name in names):
        return 0.0
    block = 10 * tower.hidden_size + 2 * tower.intermediate_size
    floats = tower.depth * tower.hidden_size + block if checkpointing else tower.depth * block
    return float(tower.spatial_merge_size**2 * floats * compute.itemsize)


def _kv_width(text: PreTrainedConfig) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
