"""The settings of sampling engines: which one, and what its arithmetic costs the trainer.

What the figures mean is told in `engines/ENGINES.md`, what the correction does in `objective/MISMATCH.md`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from npo_cli.settings import FORK, FREE, Count, Settings

Below = Annotated[float, Field(ge=1e-8, le=1)]
"""A lower bound of a weight. Further out it could not act: log-ratios end at 20 nats, and e^-20 is 2e-9."""
Above = Annotated[float, Field(ge=1, le=10**8)]
"""An upper bound or cap of a weight. No bound cuts off 1, where engine and trainer agree."""


class EngineSettings(Settings):
    """What generates tokens, and how much it may take."""

    kind: Literal["transformers", "vllm", "vllm_server"] = Field(
        "transformers",
        description="What samples: the trainer's own model, vLLM in this process, or vLLM in a process of its own.",
        json_schema_extra=FORK,
    )
    max_rows: Count = Field(512, description="Responses sampled side by side.")
    devices: str = Field(
        "",
        description="vllm_server: its GPUs, such as `1,2` (not the trainer's); empty leaves them as they are.",
        json_schema_extra=FREE,
    )
    tensor_parallel: Count = Field(
        1, description="vllm_server: GPUs that share a copy of the model.", json_schema_extra=FREE
    )
    data_parallel: Count = Field(1, description="vllm_server: copies of the model.", json_schema_extra=FREE)
    memory_share: float = Field(
        0.4, gt=0, le=1, description="vllm: share of a GPU's memory that the engine may use.", json_schema_extra=FREE
    )
    kv_cache_gb: Count = Field(1, description="vllm on a CPU: size of the KV cache.", json_schema_extra=FREE)
    graphs: bool = Field(True, description="vllm on a GPU: capture CUDA graphs.", json_schema_extra=FREE)
    max_adapters: Count = Field(
        8, description="vllm, LoRA: adapters served side by side, so candidates asked together.", json_schema_extra=FREE
    )
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
        for key in ("tensor_parallel", "data_parallel", "devices"):
            if getattr(self, key) not in (1, "") and self.kind != "vllm_server":
                raise ValueError(f"engine.{key} needs engine.kind=vllm_server")
        if self.transport == "ipc" and self.tensor_parallel * self.data_parallel > 1:
            raise ValueError("engine.transport=ipc reaches one GPU only: use nccl, or one copy on one GPU")
        return self


class MismatchSettings(Settings):
    """How own rows are corrected for an engine that computes other log-probabilities from the same weights.

    Fixed at a run's birth, like the loss: a branch is compared with the one it left, and only what is said of the
    guide may differ between them.
    """

    mode: Literal["token_tis", "sequence_tis", "token_mis", "sequence_mis", "geometric", "k3", "off"] = Field(
        "token_tis", description="Weight w = trainer/engine: capped, masked, only a filter of responses, or off."
    )
    cap: Above = Field(2.0, description="token_tis, sequence_tis: cap C of w.")
    low: Below = Field(0.5, description="token_mis, sequence_mis: smallest w kept.")
    high: Above = Field(5.0, description="token_mis, sequence_mis: largest w kept.")
    geo_low: Below = Field(0.999, description="geometric: smallest geometric mean of w of a response kept.")
    geo_high: Above = Field(1.001, description="geometric: largest geometric mean of w of a response kept.")
    k3_max: float = Field(0.01, gt=0, le=10**8, description="k3: largest mean of w - 1 - log w of a response kept.")

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "MismatchSettings":
        for low, high in (("low", "high"), ("geo_low", "geo_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"mismatch.{low} must be below mismatch.{high}, got {getattr(self, low):g} for both")
        return self
