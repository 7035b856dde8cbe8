"""Dense targets: what a teacher's probabilities at each token of the policy's own rollouts do in the loss.

N rows (responses), T tokens. A target is an object of the registry `npo_cli.registry.TARGETS`, chosen by `target.kind`:
factors on the token's policy loss, or a term beside it. `none` has neither. See `docs/explanation/dense-targets.md`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from npo_cli.config.target import TargetSettings
from npo_cli.errors import RunFailed
from npo_cli.losses.importance_ratio import log_ratio
from npo_cli.losses.types import TargetInputs, TokenColumns


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFactors:
    """Factors on the policy loss of each token, detached, and how they came about."""

    factor_NT: Tensor
    weight_NT: Tensor
    """Before it is mixed with 1."""
    clipped_NT: Tensor
    """True where the weight was clipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One value of `target.kind`. Its functions see rows that have a target only."""

    name: str
    reads: Literal["nothing", "logps", "distribution"]
    """What of the teacher is computed: nothing, the log-probability of each token, or the divergence of the policy's
    distribution from the teacher's."""
    default_rollouts: Literal["wrong", "all"] = "all"
    """`target.rollouts` where it is null."""
    factors: Callable[[TokenColumns, TargetInputs, TargetSettings], TokenFactors] | None = None
    """Multiplies the token's policy loss, which is linear in the advantage: a factor on A_t."""
    per_token: Callable[[TokenColumns, TargetInputs], Tensor] | None = None
    """Term `(N, T)` beside the policy loss, with gradient; its coefficient is `TargetInputs.coefficient`."""

    def compute_factors(
        self, tokens: TokenColumns, target: TargetInputs, settings: TargetSettings
    ) -> TokenFactors | None:
        """The factors of these rows, None if it has none. Raises RunFailed if the function does not return them."""
        if self.factors is None:
            return None
        found = self.factors(tokens, target, settings)
        if not isinstance(found, TokenFactors) or found.factor_NT.shape != tokens.mask_NT.shape:
            raise RunFailed(
                f"target.kind={self.name} returned no TokenFactors with a factor per token",
                "fix the target's `factors`",
            )
        return found

    def compute_term(self, tokens: TokenColumns, target: TargetInputs) -> Tensor | None:
        """The term of these rows, None if it has none. Raises RunFailed if the function does not return one."""
        if self.per_token is None:
            return None
        found = self.per_token(tokens, target)
        if not isinstance(found, Tensor) or found.shape != tokens.mask_NT.shape:
            raise RunFailed(f"target.kind={self.name} returned no number per token", "fix the target's `per_token`")
        return found


def weigh_tokens(tokens: TokenColumns, target: TargetInputs, settings: TargetSettings) -> TokenFactors:
    """1 - lambda + lambda w_t, w_t = clip((pi_teacher / pi_old)^sign(A), 1 - e, 1 + e).

    A token that the teacher finds likelier than the policy gains weight in a response with A > 0, and loses weight in
    one with A < 0. Never negative: no advantage changes its sign. (RLSD, arXiv 2604.03128, with a later checkpoint in
    the teacher's place.)
    """
    assert target.teacher_logps_NT is not None
    sign_N1 = tokens.advantages_N1.sign()
    raw_NT = (sign_N1 * log_ratio(target.teacher_logps_NT, target.old_logps_NT)).exp()
    low, high = 1 - settings.clip_range, 1 + settings.clip_range
    weight_NT = raw_NT.clamp(low, high)
    return TokenFactors(
        factor_NT=1 - target.coefficient + target.coefficient * weight_NT,
        weight_NT=weight_NT,
        clipped_NT=(raw_NT < low) | (raw_NT > high),
    )


def divergence(tokens: TokenColumns, target: TargetInputs) -> Tensor:
    """The divergence of the policy's distribution from the teacher's at each token (`target.divergence`), in nats."""
    assert target.divergences_NT is not None
    return torch.where(tokens.mask_NT, target.divergences_NT, 0.0)


no_target = Target(name="none", reads="nothing")
token_weight = Target(name="token_weight", reads="logps", factors=weigh_tokens)
distribution = Target(name="distribution", reads="distribution", default_rollouts="wrong", per_token=divergence)
