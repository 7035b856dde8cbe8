"""The settings of LoRA: which layers get a small matrix beside them, and of what rank."""

from pydantic import Field

from npo_cli.settings import Count, Settings


class LoraSettings(Settings):
    """Low-rank adapters of a frozen base, in peft's words. No dropout: the law that sampled a response scores it."""

    rank: Count | None = Field(None, description="Rank r of the adapters; null trains every weight instead.")
    alpha: float = Field(32.0, gt=0, description="A layer W becomes W + alpha/rank B A.")
    targets: tuple[str, ...] = Field(
        (),
        description="Last names of the layers adapted, such as q_proj; empty is every linear layer but the head.",
    )
    seed: int = Field(0, ge=0, description="Seed of A's start values; B starts at 0, so step 0 is the base.")
