"""Settings of extrapolated guides: how far the policy is extrapolated, and how its responses are used.

`guide.source=extrapolated` turns them on during training; see `docs/explanation/extrapolated-guides.md`.
"""

from typing import Literal

from pydantic import ConfigDict, Field

from npo_cli.config.base import FORK, Count, Settings, applies_when


class ExtrapolationSettings(Settings):
    """Approximate future policy: pi_t (pi_t / pi_{t-k})^a, or theta_t + a (theta_t - theta_{t-k})."""

    model_config = ConfigDict(json_schema_extra=FORK | applies_when({"guide.source": ["extrapolated"]}))

    space: Literal["logits", "weights"] = Field(
        "logits", description="What is extrapolated: `logits` (two forward passes per token) or `weights`."
    )
    k: Count = Field(20, description="Distance to the older checkpoint in steps (k in theta_{t-k}).")
    a: float = Field(1.0, ge=0, description="Extrapolation factor a (0: the policy itself, a control).")
    mode: Literal["inject", "sample"] = Field(
        "inject",
        description="`inject`: verified-correct responses take slots, like those of a guide cache. `sample`: slots "
        "are sampled from the extrapolated policy, correct or not.",
    )
    samples_per_group: Count = Field(
        2,
        description="inject: samples per group whose accuracy is <= guide.inject.max_accuracy.",
        json_schema_extra=applies_when({"guide.source": ["extrapolated"], "extrapolation.mode": ["inject"]}),
    )
    slots: Count = Field(
        2,
        description="sample: slots per group for the extrapolated policy.",
        json_schema_extra=applies_when({"guide.source": ["extrapolated"], "extrapolation.mode": ["sample"]}),
    )
