"""What the objective is given, and what it measured: the records of this room.

N rows (responses), T response tokens. All log-probabilities are in nats, at the sampling temperature.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from npo_cli.errors import NpoError
from npo_cli.objective.stats import LARGEST, SMALLEST, Additive, MismatchStats

LossKind = Literal["grpo", "gspo", "gspo_token", "cispo"]
Aggregation = Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"]
RatioMode = Literal["exact", "proximal", "decoupled", "unit", "none"]
Shape = Literal["none", "soft"]
MismatchMode = Literal["token_tis", "sequence_tis", "token_mis", "sequence_mis", "geometric", "k3", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Whole responses and what is known of them. Values outside the mask are never read, whatever they are."""

    behavior_logps_NT: Tensor
    """Under the policy that wrote the row; of an own row, as the engine that sampled it saw the same weights. NaN on
    foreign rows of which nobody knows it: no mode that reads it may be chosen for them."""
    mask_NT: Tensor
    """True on response tokens, the end token included."""
    advantages_N: Tensor
    foreign_N: Tensor
    """True where another policy wrote the row."""
    old_logps_NT: Tensor | None = None
    """Under the weights at the start of the update; None says that they are the current ones."""
    free_N: Tensor | None = None
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
    shape: Shape
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

    own_tokens: float = 0.0
    clipped_low: float = 0.0
    """Own tokens without a gradient because their ratio was too low (A < 0)."""
    clipped_high: float = 0.0
    """Own tokens without one because it was too high: above the clip (A > 0), or above a dual clip or delta (A < 0)."""
    kl_sum: float = 0.0
    """Sum of k3 towards the reference over own tokens: on foreign tokens it would not estimate a KL."""
    kl_tokens: float = 0.0
    """Own tokens with a reference."""
    foreign_tokens: float = 0.0
    foreign_kept: float = 0.0
    """Foreign tokens with a gradient: neither clipped nor of a row with A = 0."""
    known_tokens: float = 0.0
    """Foreign tokens whose probability under their writer is known."""
    ratio_sum: float = 0.0
    """Sum over those of pi_theta / pi_behavior, whichever mode charges them."""
    ratio_min: float = field(default=math.inf, metadata=SMALLEST)
    ratio_max: float = field(default=-math.inf, metadata=LARGEST)
    push: float = 0.0
    """L1 norm of d policy loss / d log-probability."""
    foreign_push: float = 0.0
    """The part of it on foreign tokens."""
    mismatch: MismatchStats = field(default_factory=MismatchStats)

    def metrics(self) -> dict[str, float]:
        """Shares and means under their public names; what has no tokens behind it is left out."""
        found = {}
        if self.own_tokens:
            found["clip_ratio/low"] = self.clipped_low / self.own_tokens
            found["clip_ratio/high"] = self.clipped_high / self.own_tokens
        if self.kl_tokens:
            found["kl"] = self.kl_sum / self.kl_tokens
        if self.foreign_tokens:
            found["inject/kept_share"] = self.foreign_kept / self.foreign_tokens
        if self.known_tokens:
            found["inject/ratio_mean"] = self.ratio_sum / self.known_tokens
            found["inject/ratio_min"] = self.ratio_min
            found["inject/ratio_max"] = self.ratio_max
        if self.foreign_tokens and self.push:
            found["inject/push_share"] = self.foreign_push / self.push
        return found | self.mismatch.metrics()
