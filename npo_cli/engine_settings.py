"""The settings of the sampling engine. Which figure means what is told in `engines/ENGINES.md`."""

from typing import Literal

from pydantic import Field, model_validator

from npo_cli.settings import FORK, FREE, Count, Settings


class EngineSettings(Settings):
    """What generates tokens, and how much it may take."""

    kind: Literal["transformers", "vllm", "vllm_server"] = Field(
        "transformers",
        description="What samples: the trainer's own model, vLLM in this process, or vLLM in a process of its own.",
        json_schema_extra=FORK,
    )
    max_rows: Count = Field(512, description="Responses sampled side by side.")
    tensor_parallel: Count = Field(1, description="vllm: GPUs that share a copy of the model.", json_schema_extra=FREE)
    data_parallel: Count = Field(1, description="vllm_server: copies of the model.", json_schema_extra=FREE)
    memory_share: float = Field(
        0.4, gt=0, le=1, description="vllm: share of a GPU's memory that the engine may use.", json_schema_extra=FREE
    )
    kv_cache_gb: float = Field(1.0, gt=0, description="vllm on a CPU: size of the KV cache.", json_schema_extra=FREE)
    graphs: bool = Field(True, description="vllm on a GPU: capture CUDA graphs.", json_schema_extra=FREE)
    sleep: bool = Field(
        True, description="vllm on a GPU: give its memory back during the update.", json_schema_extra=FREE
    )
    transport: Literal["auto", "disk", "nccl", "ipc"] = Field(
        "auto",
        description="vllm_server: how weights reach it; auto is nccl from a GPU and disk from a CPU.",
        json_schema_extra=FREE,
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest mean |log p engine - trainer| after a sync; null is 0.001 (float32), 0.1 (bfloat16).",
        json_schema_extra=FREE,
    )
    start_timeout: float = Field(600.0, gt=0, description="Seconds an engine has to start.", json_schema_extra=FREE)
    deadline: float = Field(
        1800.0,
        gt=0,
        description="Seconds a batch or a sync may take before the engine counts as hung.",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _fits(self) -> "EngineSettings":
        if self.data_parallel > 1 and self.kind != "vllm_server":
            raise ValueError("engine.data_parallel above 1 needs engine.kind=vllm_server")
        return self
