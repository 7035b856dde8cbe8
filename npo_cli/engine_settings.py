"""The settings of sampling engines: which one, and what its arithmetic costs the trainer.

What the correction does is told in `objective/MISMATCH.md`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from npo_cli.settings import Count, Settings

Below = Annotated[float, Field(ge=1e-8, le=1)]
"""A lower bound of a weight. Further out it could not act: log-ratios end at 20 nats, and e^-20 is 2e-9."""
Above = Annotated[float, Field(ge=1, le=10**8)]
"""An upper bound or cap of a weight. No bound cuts off 1, where engine and trainer agree."""


class EngineSettings(Settings):
    """What generates tokens."""

    kind: Literal["transformers"] = Field("transformers", description="What samples.")
    max_rows: Count = Field(512, description="Responses sampled side by side.")


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
