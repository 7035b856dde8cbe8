"""What the objective is given, and what it measured: the records of this room.

N rows (responses), T response tokens. All log-probabilities are in nats, at the sampling temperature.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from npo_cli.errors import NpoError
from npo_cli.losses.stats import MERGE_MAX, MERGE_MIN, Additive, MismatchStats

LossKind = Literal["grpo", "gspo", "gspo_token", "cispo"]
Aggregation = Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"]
RatioMode = Literal["exact", "proximal", "decoupled", "unit", "none"]
RatioShape = Literal["none", "soft"]
MismatchMode = Literal["token_tis", "sequence_tis", "token_mis", "sequence_mis", "geometric", "k3", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """Whole responses and what is known of them. Values outside the mask are never read, whatever they are."""

    behavior_logps_NT: Tensor
    """Under the policy that wrote the row; of an own row, as the engine that sampled it saw the same weights. NaN on
    foreign rows of which nobody knows it: no mode that reads it may be chosen for them."""
    mask_NT: Tensor
    """True on response tokens, the end token included."""
    advantages_N: Tensor
    off_policy_N: Tensor
    """True where another policy wrote the row."""
    old_logps_NT: Tensor | None = None
    """Under the weights at the start of the update; None says that they are the current ones."""
    unclipped_N: Tensor | None = None
    """True where a row is not clipped, whatever the knobs; None is nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divisors:
    """Sizes of the WHOLE optimiser batch, so that the losses of its micro-batches add up to its loss."""

    num_sequences: int
    num_tokens: int
    """Response tokens."""
    max_tokens: int
    """Longest response allowed, the constant L_max of Dr.GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchKnobs:
    """How own rows are corrected for the engine that sampled them. A mode reads its own numbers only."""

    mode: MismatchMode
    cap: float
    low: float
    high: float
    geo_low: float
    geo_high: float
    k3_max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LossKnobs:
    """Which objective, and its numbers. Carries no defaults: those live on the settings."""

    kind: LossKind
    aggregation: Aggregation
    clip_low: float
    clip_high: float
    dual_clip: float | None
    delta: float | None
    cispo_cap: float
    kl_coef: float
    entropy_coef: float
    ratio: RatioMode
    """How foreign rows are charged."""
    decoupled_cap: float
    shape: RatioShape
    """What becomes of a foreign row's ratio before the clip."""
    gamma: float
    """Constant of the soft shape."""
    mismatch: MismatchKnobs

    def __post_init__(self) -> None:
        """A delta inside the clip range would clip good tokens early, so it is refused."""
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            ceiling = 1 + self.clip_high
            raise NpoError(
                f"loss.delta must be above 1 + loss.clip_high = {ceiling:g}, got {self.delta:g}",
                f"set loss.delta above {ceiling:g}, or to null to switch it off",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossStats(Additive):
    """What one micro-batch measured. Stats add up; `LossStats()` is the zero."""

    on_policy_tokens: float = 0.0
    clipped_low: float = 0.0
    """Own tokens without a gradient because their ratio was too low (A < 0)."""
    clipped_high: float = 0.0
    """Own tokens without one because it was too high: above the clip (A > 0), or above a dual clip or delta (A < 0)."""
    kl_sum: float = 0.0
    """Sum of k3 towards the reference over own tokens: on foreign tokens it would not estimate a KL."""
    kl_tokens: float = 0.0
    """Own tokens with a reference."""
    off_policy_tokens: float = 0.0
    off_policy_tokens_with_gradient: float = 0.0
    """Foreign tokens with a gradient: neither clipped nor of a row with A = 0."""
    off_policy_tokens_with_logps: float = 0.0
    """Foreign tokens whose probability under their writer is known."""
    ratio_sum: float = 0.0
    """Sum over those of pi_theta / pi_behavior, whichever mode charges them."""
    ratio_min: float = field(default=math.inf, metadata=MERGE_MIN)
    ratio_max: float = field(default=-math.inf, metadata=MERGE_MAX)
    gradient_magnitude: float = 0.0
    """L1 norm of d policy loss / d log-probability."""
    off_policy_gradient_magnitude: float = 0.0
    """The part of it on foreign tokens."""
    mismatch: MismatchStats = field(default_factory=MismatchStats)

    def metrics(self) -> dict[str, float]:
        """Shares and means under their public names; what has no tokens behind it is left out."""
        found = {}
        if self.on_policy_tokens:
            found["clip_ratio/low"] = self.clipped_low / self.on_policy_tokens
            found["clip_ratio/high"] = self.clipped_high / self.on_policy_tokens
        if self.kl_tokens:
            found["kl"] = self.kl_sum / self.kl_tokens
        if self.off_policy_tokens:
            found["inject/kept_share"] = self.off_policy_tokens_with_gradient / self.off_policy_tokens
        if self.off_policy_tokens_with_logps:
            found["inject/ratio_mean"] = self.ratio_sum / self.off_policy_tokens_with_logps
            found["inject/ratio_min"] = self.ratio_min
            found["inject/ratio_max"] = self.ratio_max
        if self.off_policy_tokens and self.gradient_magnitude:
            found["inject/push_share"] = self.off_policy_gradient_magnitude / self.gradient_magnitude
        return found | self.mismatch.metrics()
