"""The settings of extrapolated guides: how far the policy is pushed along its own motion, and who gets its answers.

`guide.source=extrapolated` turns them on while training; see `guide/EXTRAPOLATED.md`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from npo_cli.settings import FORK, Count, Settings

Strength = Annotated[float, Field(gt=0)]


class ExtrapolateSettings(Settings):
    """A near future that need not be trained: pi_t (pi_t / pi_{t-k})^a, or theta_t + a (theta_t - theta_{t-k})."""

    space: Literal["logits", "weights"] = Field(
        "logits", description="What is pushed: logits (two forward passes a token) or weights.", json_schema_extra=FORK
    )
    k: Count = Field(
        20, description="Steps back of the older copy, which is a checkpoint of the run.", json_schema_extra=FORK
    )
    a: float = Field(
        1.0,
        ge=0,
        description="How far: a times the motion of those k steps. 0 asks the policy itself: the control.",
        json_schema_extra=FORK,
    )
    seat: Literal["inject", "seats"] = Field(
        "inject",
        description="inject: a verified answer takes a slot. seats: slots are sampled from it, right or wrong.",
        json_schema_extra=FORK,
    )
    samples: Count = Field(2, description="inject: samples of a group that the gate lets in.", json_schema_extra=FORK)
    seats: Count = Field(2, description="seats: slots of such a group.", json_schema_extra=FORK)
    refresh: int = Field(
        0, ge=0, description="Steps between choices of k and a by S; 0 keeps both as they are.", json_schema_extra=FORK
    )
    k_grid: tuple[Count, ...] = Field(
        (20, 40), min_length=1, description="refresh: values of k to choose from.", json_schema_extra=FORK
    )
    a_grid: tuple[Strength, ...] = Field(
        (1.0, 2.0), min_length=1, description="refresh: values of a to choose from.", json_schema_extra=FORK
    )
    prompts: Count = Field(
        24, description="refresh: failed prompts, the newest, that each choice is tried on.", json_schema_extra=FORK
    )
    confidence: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="refresh: Q_net must be above 0 with this one-sided probability, else nobody is asked.",
        json_schema_extra=FORK,
    )
    max_kl: float = Field(
        4.0,
        gt=0,
        description="refresh: most KL a sequence to the policy (nats); above it a is broken.",
        json_schema_extra=FORK,
    )

    @model_validator(mode="after")
    def _grids_are_sets(self) -> "ExtrapolateSettings":
        for key in ("k_grid", "a_grid"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"extrapolate.{key} names a value twice")
        return self

    @property
    def lags(self) -> tuple[int, ...]:
        """Every k that may be in use."""
        return (self.k, *self.k_grid) if self.refresh else (self.k,)
