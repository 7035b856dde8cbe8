"""The settings of scoring guides: which Q, which V, and how they are put together."""

from typing import Literal

from pydantic import Field

from npo_cli.settings import FREE, Count, Settings


class ScoreSettings(Settings):
    """How candidates are compared as guides: Q, V and S."""

    prompts: Count = Field(192, description="Pool prompts on which the learner is probed.", json_schema_extra=FREE)
    k: Count = Field(8, description="Samples a prompt, of the learner and of each candidate.", json_schema_extra=FREE)
    quality: Literal["pass@1", "pass@k"] = Field(
        "pass@k", description="Which quality enters S.", json_schema_extra=FREE
    )
    variance: Literal["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"] = Field(
        "group2", description="Which V enters S.", json_schema_extra=FREE
    )
    kappa: float = Field(1.0, gt=0, description="Scale of the exponent of kl_exp.", json_schema_extra=FREE)
    cap: float = Field(10.0, gt=1, description="Truncation C of sequence and token weights.", json_schema_extra=FREE)
    average: Literal["sequence", "token"] = Field(
        "sequence", description="Average behind the per-token KL.", json_schema_extra=FREE
    )
    alpha: float = Field(1.0, ge=0, description="Exponent of V in S.", json_schema_extra=FREE)
    rule: Literal["argmax", "one_se"] = Field(
        "argmax", description="How the guide is chosen from S.", json_schema_extra=FREE
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="Total (candidate, prompt) pairs, spent by sequential halving; null asks all of all candidates.",
        json_schema_extra=FREE,
    )
    resamples: Count = Field(2000, description="Bootstrap resamples of prompts.", json_schema_extra=FREE)
