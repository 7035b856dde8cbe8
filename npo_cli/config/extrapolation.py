"""Settings of extrapolated guides: how far the policy is extrapolated, and how its responses are used.

`guide.source=extrapolated` turns them on during training; see `docs/explanation/extrapolated-guides.md`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from npo_cli.config.base import FORK, Count, Settings

Strength = Annotated[float, Field(gt=0)]


class ExtrapolationSettings(Settings):
    """Approximate future policy: pi_t (pi_t / pi_{t-k})^a, or theta_t + a (theta_t - theta_{t-k})."""

    space: Literal["logits", "weights"] = Field(
        "logits",
        description="What is extrapolated: `logits` (two forward passes per token) or `weights`.",
        json_schema_extra=FORK,
    )
    k: Count = Field(
        20, description="Distance to the older checkpoint in steps (k in theta_{t-k}).", json_schema_extra=FORK
    )
    a: float = Field(
        1.0,
        ge=0,
        description="Extrapolation factor a (0: the policy itself, a control).",
        json_schema_extra=FORK,
    )
    mode: Literal["inject", "sample"] = Field(
        "inject",
        description="`inject`: verified-correct responses take slots, like those of a guide cache. `sample`: slots "
        "are sampled from the extrapolated policy, correct or not.",
        json_schema_extra=FORK,
    )
    samples_per_group: Count = Field(
        2,
        description="inject: samples per group whose accuracy is <= guide.inject.max_accuracy.",
        json_schema_extra=FORK,
    )
    slots: Count = Field(2, description="sample: slots per group for the extrapolated policy.", json_schema_extra=FORK)
    refresh: int = Field(
        0,
        ge=0,
        description="Steps between searches for the k and a with the highest S (0: off).",
        json_schema_extra=FORK,
    )
    k_grid: tuple[Count, ...] = Field(
        (20, 40), min_length=1, description="refresh: candidate values of k.", json_schema_extra=FORK
    )
    a_grid: tuple[Strength, ...] = Field(
        (1.0, 2.0), min_length=1, description="refresh: candidate values of a.", json_schema_extra=FORK
    )
    prompts: Count = Field(
        24, description="refresh: number of recently failed prompts per candidate.", json_schema_extra=FORK
    )
    confidence: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="refresh: one-sided confidence that Q_net > 0; without it the guide is not used.",
        json_schema_extra=FORK,
    )
    max_kl: float = Field(
        4.0,
        gt=0,
        description="refresh: reject candidates with per-sequence KL to the policy above this (nats).",
        json_schema_extra=FORK,
    )

    @model_validator(mode="after")
    def _grids_are_sets(self) -> "ExtrapolationSettings":
        for key in ("k_grid", "a_grid"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"extrapolation.{key} contains a value twice")
        return self

    @property
    def lags(self) -> tuple[int, ...]:
        """Every k that may be in use."""
        return (self.k, *self.k_grid) if self.refresh else (self.k,)
