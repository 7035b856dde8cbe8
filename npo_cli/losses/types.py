"""Inputs of the policy loss. All log-probabilities are in nats, at the sampling temperature.

N rows (responses), T response tokens; an axis of length 1 broadcasts.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Divisors:
    """Sizes of the WHOLE optimizer batch, so that the losses of its micro-batches (and ranks) add up to its loss."""

    num_sequences: int
    num_tokens: int
    """Trained response tokens."""
    max_tokens: int
    """Longest response allowed, the constant L_max of Dr.GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenColumns:
    """What surrogates and loss terms read, computed once per micro-batch. Every column is zero outside the mask."""

    logps_NT: Tensor
    """Under the policy being trained, with gradient."""
    log_ratio_NT: Tensor
    """log rho = logps - anchor, clamped to +-20 nats, with gradient."""
    weight_NT: Tensor
    """Factor on the token's policy loss after clipping: that of the importance ratio off-policy, that of the
    inference/trainer mismatch on-policy."""
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
