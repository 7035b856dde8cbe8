"""Surrogate objectives per token: what GRPO, GSPO, GSPO-token and CISPO make of a ratio and an advantage.

N rows (responses), T tokens; an axis of length 1 broadcasts. A surrogate does not know which policy sampled a token:
tokens that must not be clipped are marked in `TokenColumns.unclipped_NT`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npo_cli.config.recipe import LossSettings
from npo_cli.losses.importance_ratio import LOG_RATIO_LIMIT
from npo_cli.losses.types import TokenColumns


@dataclass(frozen=True, kw_only=True, slots=True)
class SurrogateTerms:
    """A loss per token, and how each token's gradient was treated."""

    loss_NT: Tensor
    gradient_factor_NT: Tensor
    """Size of the factor on A grad log pi, detached; 0 where the gradient is cut."""
    clipped_low_NT: Tensor
    """True where it was cut because the ratio was too low."""
    clipped_high_NT: Tensor
    """True where it was cut because the ratio was too high."""


def clipped_surrogate(ratio_NT: Tensor, tokens: TokenColumns, settings: LossSettings) -> SurrogateTerms:
    """PPO's pessimistic surrogate: -min(min(rho, delta) A, clip(rho, low, high) A), and at most -c A where A < 0.

    low = 1 - clip_low, high = 1 + clip_high. The gradient is rho A grad l, or 0 for A > 0 above `high`, and for A < 0
    below `low` or above c or delta. Unclipped tokens have infinite bounds.
    (Dual clip: arXiv 1912.09729; delta: INTELLECT-2, arXiv 2505.07291; low != high: DAPO, arXiv 2503.14476.)
    """
    advantages_N1 = tokens.advantages_N1
    low_NT = _bound(1 - settings.clip_low, tokens, unbounded=-math.inf)
    high_NT = _bound(1 + settings.clip_high, tokens)
    delta_NT, dual_clip_NT = _bound(settings.delta, tokens), _bound(settings.dual_clip, tokens)
    capped_NT = torch.minimum(ratio_NT, delta_NT)
    clipped_NT = torch.clamp(ratio_NT, min=low_NT, max=high_NT)
    loss_NT = -torch.minimum(capped_NT * advantages_N1, clipped_NT * advantages_N1)
    ceiling_NT = torch.where(advantages_N1 < 0, -dual_clip_NT * advantages_N1, math.inf)
    ratio_NT = ratio_NT.detach()
    too_low_NT = (advantages_N1 < 0) & (ratio_NT < low_NT)
    over_cap_NT = ratio_NT > torch.minimum(dual_clip_NT, delta_NT)
    too_high_NT = ((advantages_N1 > 0) & (ratio_NT > high_NT)) | ((advantages_N1 < 0) & over_cap_NT)
    return SurrogateTerms(
        loss_NT=torch.minimum(loss_NT, ceiling_NT),
        gradient_factor_NT=ratio_NT.masked_fill(too_low_NT | too_high_NT, 0.0),
        clipped_low_NT=too_low_NT,
        clipped_high_NT=too_high_NT,
    )


def grpo(tokens: TokenColumns, settings: LossSettings) -> SurrogateTerms:
    """Each token is clipped by its own ratio rho_t = exp(l - l_anchor), shaped if off-policy. (arXiv 2402.03300.)"""
    ratio_NT = tokens.log_ratio_NT.exp()
    terms = clipped_surrogate(shape_ratio(ratio_NT, tokens), tokens, settings)
    if tokens.shaping_gamma is not None:
        # d log f / d log r = gamma / (r + gamma)
        slope_NT = tokens.shaping_gamma / (ratio_NT.detach() + tokens.shaping_gamma)
        factor_NT = torch.where(tokens.off_policy_NT, terms.gradient_factor_NT * slope_NT, terms.gradient_factor_NT)
        terms = replace(terms, gradient_factor_NT=factor_NT)
    return _cut_clamped(terms, tokens)


def shape_ratio(ratio_NT: Tensor, tokens: TokenColumns) -> Tensor:
    """f(r) = r / (r + gamma) on off-policy tokens: from 0 to 1, steepest where r is small. r itself without gamma.

    As a factor on A grad log pi: r f'(r) = gamma r / (r + gamma)^2, which peaks at 1/4 for r = gamma and is .0826 at
    r = 1 for gamma = .1. (Policy shaping of LUFFY, arXiv 2504.14945, and ExGRPO, arXiv 2510.02245.)
    """
    if tokens.shaping_gamma is None:
        return ratio_NT
    return torch.where(tokens.off_policy_NT, ratio_NT / (ratio_NT + tokens.shaping_gamma), ratio_NT)


def gspo(tokens: TokenColumns, settings: LossSettings) -> SurrogateTerms:
    """All tokens are clipped by the sequence's ratio s = exp(mean_t log rho_t), its geometric mean. (arXiv 2507.18071.)

    An empty sequence has s = 1 and, having no tokens, adds nothing.
    """
    ratio_NT = sequence_ratio(tokens).expand_as(tokens.logps_NT)
    return _cut_clamped(clipped_surrogate(ratio_NT, tokens, settings), tokens)


def gspo_token(tokens: TokenColumns, settings: LossSettings) -> SurrogateTerms:
    """GSPO's value with token gradients: the ratio is sg[s] * pi / sg[pi]. (arXiv 2507.18071.)"""
    token_NT = (tokens.logps_NT - tokens.logps_NT.detach()).exp()
    return clipped_surrogate(sequence_ratio(tokens).detach() * token_NT, tokens, settings)


def cispo(tokens: TokenColumns, settings: LossSettings) -> SurrogateTerms:
    """-sg[min(rho, cap)] A l: a large ratio loses weight, never its gradient. (MiniMax-M1, arXiv 2506.13585.)"""
    weight_NT = torch.minimum(tokens.log_ratio_NT.detach().exp(), _bound(settings.cispo_cap, tokens))
    never_NT = torch.zeros_like(tokens.mask_NT)
    return SurrogateTerms(
        loss_NT=-weight_NT * tokens.advantages_N1 * tokens.logps_NT,
        gradient_factor_NT=weight_NT,
        clipped_low_NT=never_NT,
        clipped_high_NT=never_NT,
    )


def sequence_ratio(tokens: TokenColumns) -> Tensor:
    """s = exp((1/T) sum_t log rho_t), one per row."""
    lengths_N1 = tokens.mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
    return (tokens.log_ratio_NT.sum(dim=1, keepdim=True) / lengths_N1).exp()


SURROGATES: dict[str, Callable[[TokenColumns, LossSettings], SurrogateTerms]] = {
    "grpo": grpo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
}
"""By the value of `loss.kind`."""


def _bound(value: float | None, tokens: TokenColumns, *, unbounded: float = math.inf) -> Tensor:
    """The setting per token; unbounded where the token is not clipped or the setting is off."""
    return torch.where(tokens.unclipped_NT, unbounded, unbounded if value is None else value)


def _cut_clamped(terms: SurrogateTerms, tokens: TokenColumns) -> SurrogateTerms:
    """A log-ratio at its limit of 20 nats passes no gradient."""
    clamped_NT = tokens.log_ratio_NT.abs() >= LOG_RATIO_LIMIT
    return replace(terms, gradient_factor_NT=terms.gradient_factor_NT.masked_fill(clamped_NT, 0.0))
