"""Inputs and statistics of the policy loss. All log-probabilities are in nats, at the sampling temperature.

N rows (responses), T response tokens; an axis of length 1 broadcasts. Statistics are sums, maxima and a histogram,
which add up over micro-batches, ranks and updates; means and percentiles are computed last, by `metrics()`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """Whole responses and their provenance per token. Values outside the mask are never read, whatever they are."""

    mask_NT: Tensor
    """True on the response tokens that are trained, the end token included."""
    off_policy_NT: Tensor
    """True where another policy than the one being trained sampled the token."""
    behavior_logps_NT: Tensor
    """Under the policy that sampled the token; of an on-policy token, as the inference engine computed it. NaN on
    off-policy tokens without log-probabilities: the importance ratio in use must not need them."""
    advantages_N: Tensor
    old_logps_NT: Tensor | None = None
    """Under the weights at the start of the update; None: the current log-probabilities."""
    unclipped_NT: Tensor | None = None
    """True where no clip and no cap applies, whatever the settings; None: nowhere."""
    token_weights_NT: Tensor | None = None
    """Factor on the policy loss of each token; None: 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divisors:
    """Sizes of the WHOLE optimizer batch, so that the losses of its micro-batches (and ranks) add up to its loss."""

    num_sequences: int
    num_tokens: int
    """Trained response tokens."""
    max_tokens: int
    """Longest response allowed, the constant L_max of Dr.GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetInputs:
    """What a dense target adds to rows of the policy's own rollouts, all of which have the target. Detached, but for
    the divergences."""

    coefficient: float
    """`target.weight` by its schedule."""
    old_logps_NT: Tensor
    """Under the policy at the start of the step."""
    teacher_logps_NT: Tensor | None = None
    """Of each token under the teacher, if the target reads them."""
    divergences_NT: Tensor | None = None
    """Of the policy's distribution from the teacher's, with gradient, if the target reads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenColumns:
    """What surrogates and loss terms read, computed once per micro-batch. Every column is zero outside the mask."""

    logps_NT: Tensor
    """Under the policy being trained, with gradient."""
    log_ratio_NT: Tensor
    """log rho = logps - anchor, clamped to +-20 nats, with gradient."""
    weight_NT: Tensor
    """Factor on the token's policy loss after clipping: that of the importance ratio off-policy, that of the
    inference/trainer mismatch on-policy, times the span's weight and a dense target's token weight."""
    behavior_logps_NT: Tensor
    mask_NT: Tensor
    off_policy_NT: Tensor
    """False outside the mask."""
    unclipped_NT: Tensor
    advantages_N1: Tensor
    shaping_gamma: float | None
    """Constant of the soft shape of off-policy ratios; None: not shaped."""
    ref_logps_NT: Tensor | None
    """Under the frozen base model."""
    entropies_NT: Tensor | None
    """Of the policy's distribution at each token, with gradient."""

    @property
    def on_policy_NT(self) -> Tensor:
        """True on trained tokens that the policy itself sampled."""
        return self.mask_NT & ~self.off_policy_NT


MERGE_MIN = {"merge": min}
MERGE_MAX = {"merge": max}

HISTOGRAM_EDGES = (*(10.0 ** (k / 20 - 7) for k in range(167)), 20.0)
"""Upper ends of the histogram's bins, in nats: 1e-7 (what float32 rounds off a log-probability), then 20 bins a decade,
each 12 % wider, up to 20 (where log-ratios are clamped). One more bin counts NaN."""


def _add_bins(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))


MERGE_BINS = {"merge": _add_bins}


class Additive:
    """A record whose fields are summed, or merged as a field's metadata says. Its defaults are the zero."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        merged = {}
        for each in fields(self):
            first, second = getattr(self, each.name), getattr(other, each.name)
            merged[each.name] = each.metadata["merge"](first, second) if each.metadata else first + second
        return type(self)(**merged)


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchStats(Additive):
    """w = pi_old / mu per on-policy token, trainer over engine, raw, whatever `mismatch.mode` is.

    Only trained rows are measured: without a KL or entropy term, a row with A = 0 has no forward pass.
    """

    tokens: float = 0.0
    weight_sum: float = 0.0
    weight_square_sum: float = 0.0
    weight_max: float = field(default=-math.inf, metadata=MERGE_MAX)
    k1_sum: float = 0.0
    """Sum of -log w, in nats."""
    k3_sum: float = 0.0
    """Sum of w - 1 - log w, in nats."""
    clipped_tokens: float = 0.0
    """Tokens whose weight the mode truncated or masked."""
    sequences: float = 0.0
    unmasked_sequences: float = 0.0
    """Sequences with at least one token whose weight is not 0."""
    histogram: tuple[float, ...] = field(default=(0.0,) * (len(HISTOGRAM_EDGES) + 1), metadata=MERGE_BINS)
    """Tokens by |log w|, each in the first bin whose upper end (HISTOGRAM_EDGES) is not below it."""

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Self:
        """From the fields in order, the histogram's bins one by one."""
        names = [each.name for each in fields(cls)]
        scalars = dict(zip(names[:-1], numbers, strict=False))
        return cls(**scalars, histogram=tuple(numbers[len(scalars) :]))

    def metrics(self) -> dict[str, float]:
        """Metrics of the raw w; empty without tokens.

        k1 and k3 estimate KL(mu || pi_old) in nats per token. ess = (mean w)^2 / mean w^2, chi2 = mean w^2 - 1.
        """
        if not self.tokens:
            return {}
        mean, mean_square = self.weight_sum / self.tokens, self.weight_square_sum / self.tokens
        return {
            "mismatch/weight_mean": mean,
            "mismatch/weight_max": self.weight_max,
            "mismatch/clipped_fraction": self.clipped_tokens / self.tokens,
            "mismatch/ess": mean**2 / mean_square,
            "mismatch/k1": self.k1_sum / self.tokens,
            "mismatch/k3": self.k3_sum / self.tokens,
            "mismatch/chi2": mean_square - 1,
            "mismatch/abs_log_w_p99": self._percentile(99),
            "mismatch/kept_fraction": self.unmasked_sequences / self.sequences,
        }

    def _percentile(self, percent: int) -> float:
        """Upper end of the bin that holds the percentile: at most 12 % too high, never too low; 0 below 1e-7."""
        seen = 0.0
        for count, upper in zip(self.histogram, (0.0, *HISTOGRAM_EDGES[1:]), strict=False):
            seen += count
            if 100 * seen >= percent * self.tokens:
                return upper
        return math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class LossStats(Additive):
    """Measurements of one micro-batch. They add up; `LossStats()` is the zero."""

    on_policy_tokens: float = 0.0
    clipped_low: float = 0.0
    """On-policy tokens without gradient because the ratio was too low (A < 0)."""
    clipped_high: float = 0.0
    """On-policy tokens without gradient because the ratio was too high: above the clip (A > 0), the dual clip or delta
    (A < 0)."""
    kl_sum: float = 0.0
    """Sum of k3 to the reference over on-policy tokens; over off-policy tokens it would not estimate a KL."""
    kl_tokens: float = 0.0
    """On-policy tokens with a reference."""
    off_policy_tokens: float = 0.0
    off_policy_tokens_with_gradient: float = 0.0
    """Off-policy tokens with gradient: neither clipped nor of a row with A = 0."""
    off_policy_tokens_with_logps: float = 0.0
    """Off-policy tokens whose behavior log-probability is available."""
    ratio_sum: float = 0.0
    """Sum over those of pi_theta / pi_behavior, whatever `guide.inject.ratio` is."""
    ratio_min: float = field(default=math.inf, metadata=MERGE_MIN)
    ratio_max: float = field(default=-math.inf, metadata=MERGE_MAX)
    gradient_magnitude: float = 0.0
    """L1 norm of d policy loss / d log-probability."""
    off_policy_gradient_magnitude: float = 0.0
    """Its part on off-policy tokens."""
    target_tokens: float = 0.0
    """Tokens with a dense target: those that the teacher scored."""
    target_kl_sum: float = 0.0
    """Sum over those of the divergence, or of its k3 estimate."""
    target_weighted_tokens: float = 0.0
    target_weight_sum: float = 0.0
    """Sum over those of the token weight, before it is mixed with 1."""
    target_weights_clipped: float = 0.0
    mismatch: MismatchStats = field(default_factory=MismatchStats)

    def metrics(self) -> dict[str, float]:
        """Fractions and means by metric name; a metric without tokens is absent."""
        metrics = {}
        if self.on_policy_tokens:
            metrics["clip_ratio/low"] = self.clipped_low / self.on_policy_tokens
            metrics["clip_ratio/high"] = self.clipped_high / self.on_policy_tokens
        if self.kl_tokens:
            metrics["kl"] = self.kl_sum / self.kl_tokens
        if self.off_policy_tokens:
            metrics["inject/tokens_with_gradient"] = self.off_policy_tokens_with_gradient / self.off_policy_tokens
        if self.off_policy_tokens_with_logps:
            metrics["inject/ratio_mean"] = self.ratio_sum / self.off_policy_tokens_with_logps
            metrics["inject/ratio_min"] = self.ratio_min
            metrics["inject/ratio_max"] = self.ratio_max
        if self.off_policy_tokens and self.gradient_magnitude:
            metrics["inject/gradient_l1_fraction"] = self.off_policy_gradient_magnitude / self.gradient_magnitude
        if self.target_tokens:
            metrics["target/kl"] = self.target_kl_sum / self.target_tokens
        if self.target_weighted_tokens:
            metrics["target/weight_mean"] = self.target_weight_sum / self.target_weighted_tokens
            metrics["target/clipped_fraction"] = self.target_weights_clipped / self.target_weighted_tokens
        return metrics | self.mismatch.metrics()
