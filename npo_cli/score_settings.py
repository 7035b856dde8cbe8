"""Scoring settings: how guide candidates are sampled and which Q and V make S."""

from typing import Literal

from pydantic import Field

from npo_cli.settings import FREE, Count, Settings


class ScoringSettings(Settings):
    """How guide candidates are compared: Q, V and S."""

    num_prompts: Count = Field(
        192,
        description="Number of training prompts that learner and candidates are sampled on.",
        json_schema_extra=FREE,
    )
    samples_per_prompt: Count = Field(
        8, description="Responses per prompt, for the learner and for each candidate.", json_schema_extra=FREE
    )
    quality: Literal["pass@1", "pass@k"] = Field("pass@k", description="Quality Q used in S.", json_schema_extra=FREE)
    variance: Literal["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"] = Field(
        "group2", description="Variance estimator V used in S.", json_schema_extra=FREE
    )
    kl_scale: float = Field(
        1.0, gt=0, description="kl_exp: kappa, the factor of the KL in the exponent.", json_schema_extra=FREE
    )
    weight_cap: float = Field(
        10.0, gt=1, description="Truncation C of sequence and token importance weights.", json_schema_extra=FREE
    )
    kl_average: Literal["sequence", "token"] = Field(
        "sequence",
        description="Per-token KL: mean over sequences of each sequence's mean, or mean over all tokens.",
        json_schema_extra=FREE,
    )
    variance_exponent: float = Field(
        1.0, ge=0, description="Exponent alpha in S = Q / V^alpha.", json_schema_extra=FREE
    )
    selection_rule: Literal["argmax", "one_se"] = Field(
        "argmax",
        description="How the guide is chosen from S: highest S (`argmax`), or one standard error rule (`one_se`).",
        json_schema_extra=FREE,
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="Total number of (candidate, prompt) pairs, spent by sequential halving (null: all pairs).",
        json_schema_extra=FREE,
    )
    bootstrap_resamples: Count = Field(
        2000, description="Number of bootstrap resamples over prompts.", json_schema_extra=FREE
    )
