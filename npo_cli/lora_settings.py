"""LoRA settings: which layers get an adapter, and of what rank."""

from pydantic import Field

from npo_cli.settings import Count, Settings


class LoraSettings(Settings):
    """Low-rank adapters on a frozen base model, named as in peft. No dropout: sampling and scoring use one policy."""

    rank: Count | None = Field(None, description="Rank r of the adapters (null: full fine-tuning).")
    alpha: float = Field(32.0, gt=0, description="Scale: a weight W becomes W + alpha/rank B A.")
    targets: tuple[str, ...] = Field(
        (),
        description="Names of the adapted layers, such as q_proj (empty: every linear layer except the LM head).",
    )
    seed: int = Field(0, ge=0, description="Seed for initializing A; B starts at 0, so step 0 is the base model.")
