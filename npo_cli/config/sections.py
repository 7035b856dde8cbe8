"""Settings of multi-process training, explained in `docs/explanation/distributed.md`.

LoRA settings: which layers get an adapter, and of what rank.

Settings of experiment trackers, which log metrics besides the run directory's own files.
"""

from typing import Literal

from pydantic import ConfigDict, Field

from npo_cli.config.base import FREE, IGNORED, Count, Settings


class LoraSettings(Settings):
    """Low-rank adapters on a frozen base model, named as in peft. No dropout: sampling and scoring use one policy."""

    rank: Count | None = Field(None, description="Rank r of the adapters (null: full fine-tuning).")
    alpha: float = Field(32.0, gt=0, description="Scale: a weight W becomes W + alpha/rank B A.")
    targets: tuple[str, ...] = Field(
        (),
        description="Names of the adapted layers, such as q_proj (empty: every linear layer except the LM head).",
    )
    seed: int = Field(0, ge=0, description="Seed for initializing A; B starts at 0, so step 0 is the base model.")


class DistributedSettings(Settings):
    """FSDP2-sharded training, when a launcher such as torchrun starts several processes; unused otherwise."""

    model_config = ConfigDict(json_schema_extra=IGNORED)

    reshard_after_forward: bool = Field(
        True,
        description="Free a layer's gathered weights after its forward pass (less memory, one more all-gather).",
        json_schema_extra=FREE,
    )
    timeout: float = Field(
        1800.0,
        gt=0,
        description="Timeout in seconds for a process waiting for the others; the job fails after it.",
        json_schema_extra=FREE,
    )


class TrackingSettings(Settings):
    """Experiment trackers. The files of the run directory are always written; npo reads only those."""

    model_config = ConfigDict(json_schema_extra=IGNORED)

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (),
        description="Trackers to log to: `tensorboard`, `wandb`, `trackio` (empty: none).",
        json_schema_extra=FREE,
    )
    project: str = Field("npo", min_length=1, description="wandb, trackio: project name.", json_schema_extra=FREE)
