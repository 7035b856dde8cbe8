"""The objectives, token by token: what GRPO, GSPO, GSPO-token and CISPO make of a ratio and an advantage.

N rows (responses), T tokens; an axis of length 1 broadcasts. No surrogate knows who wrote a row: a row that must
not be clipped has infinite bounds, and so has a knob that is off.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npo_cli.losses.importance_ratio import LOG_RATIO_LIMIT, k3, log_ratio
from npo_cli.losses.types import LossKind, LossKnobs


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBounds:
    """Where each row's ratio is cut."""

    low_N1: Tensor
    high_N1: Tensor
    dual_clip_N1: Tensor
    """Cap c of the loss of a negative advantage, in units of |A|."""
    delta_N1: Tensor
    """Cap of the ratio before the min."""
    cispo_cap_N1: Tensor
    """Cap of the CISPO weight."""
    gamma_N1: Tensor
    """Constant gamma of a row whose ratio is shaped; infinite where it is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SurrogateInputs:
    """What a surrogate looks at. Every column is zero outside the mask."""

    logps_NT: Tensor
    log_ratio_NT: Tensor
    mask_NT: Tensor
    advantages_N1: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SurrogateTerms:
    """A token loss, with how it treats each token."""

    loss_NT: Tensor
    dloss_dlogp_factor_NT: Tensor
    """Size of the factor on A grad log pi, detached; 0 where the gradient is cut."""
    clipped_low_NT: Tensor
    """True where it was cut because the ratio was too low."""
    clipped_high_NT: Tensor
    """True where it was cut because the ratio was too high."""


def make_clip_bounds(free_N1: Tensor, shaped_N1: Tensor, knobs: LossKnobs) -> ClipBounds:
    """The knobs as one number per row: [1 - clip_low, 1 + clip_high] and the caps; a free row has none.

    `shaped_N1` is true where the ratio takes the shape that the knobs name.
    """

    def per_row(bound: float | None, unbounded: float) -> Tensor:
        value = unbounded if bound is None else bound
        return torch.full(free_N1.shape, value, dtype=torch.float32, device=free_N1.device).masked_fill(
            free_N1, unbounded
        )

    return ClipBounds(
        low_N1=per_row(1 - knobs.clip_low, -math.inf),
        high_N1=per_row(1 + knobs.clip_high, math.inf),
        dual_clip_N1=per_row(knobs.dual_clip, math.inf),
        delta_N1=per_row(knobs.delta, math.inf),
        cispo_cap_N1=per_row(knobs.cispo_cap, math.inf),
        gamma_N1=torch.where(shaped_N1 & (knobs.shape == "soft"), knobs.gamma, math.inf),
    )


def shape_ratio(ratio_NT: Tensor, soft_N1: Tensor) -> Tensor:
    """f(r) = r / (r + gamma): from 0 to 1, steepest where r is small. r itself where gamma is infinite.

    As a factor on A grad log pi: r f'(r) = gamma r / (r + gamma)^2, which peaks at 1/4 for r = gamma and is .0826 at
    r = 1 for gamma = .1. (Policy shaping of LUFFY, arXiv 2504.14945, and ExGRPO, arXiv 2510.02245.)
    """
    return torch.where(soft_N1.isinf(), ratio_NT, ratio_NT / (ratio_NT + soft_N1))


def clipped_terms(ratio_NT: Tensor, advantages_N1: Tensor, bounds: ClipBounds) -> SurrogateTerms:
    """PPO's pessimistic surrogate: -min(min(rho, delta) A, clip(rho, low, high) A), and at most -c A where A < 0.

    The gradient is rho A grad l, or 0 for A > 0 above `high`, and for A < 0 below `low` or above c or delta.
    (Dual clip: arXiv 1912.09729; delta: INTELLECT-2, arXiv 2505.07291; low != high: DAPO, arXiv 2503.14476.)
    """
    capped_NT = torch.minimum(ratio_NT, bounds.delta_N1)
    clipped_NT = torch.clamp(ratio_NT, min=bounds.low_N1, max=bounds.high_N1)
    loss_NT = -torch.minimum(capped_NT * advantages_N1, clipped_NT * advantages_N1)
    worst_N1 = torch.where(advantages_N1 < 0, -bounds.dual_clip_N1 * advantages_N1, math.inf)
    ratio_NT = ratio_NT.detach()
    low_NT = (advantages_N1 < 0) & (ratio_NT < bounds.low_N1)
    over_cap_NT = ratio_NT > torch.minimum(bounds.dual_clip_N1, bounds.delta_N1)
    high_NT = ((advantages_N1 > 0) & (ratio_NT > bounds.high_N1)) | ((advantages_N1 < 0) & over_cap_NT)
    gain_NT = ratio_NT.masked_fill(low_NT | high_NT, 0.0)
    return SurrogateTerms(
        loss_NT=torch.minimum(loss_NT, worst_N1),
        dloss_dlogp_factor_NT=gain_NT,
        clipped_low_NT=low_NT,
        clipped_high_NT=high_NT,
    )


def grpo_terms(tokens: SurrogateInputs, bounds: ClipBounds) -> SurrogateTerms:
    """Each token is clipped by its own ratio rho_t = exp(l - l_anchor), perhaps shaped. (GRPO, arXiv 2402.03300.)"""
    ratio_NT = tokens.log_ratio_NT.exp()
    terms = clipped_terms(shape_ratio(ratio_NT, bounds.gamma_N1), tokens.advantages_N1, bounds)
    # d log f / d log r = gamma / (r + gamma), and 1 without a shape.
    slope_NT = torch.where(bounds.gamma_N1.isinf(), 1.0, bounds.gamma_N1 / (ratio_NT.detach() + bounds.gamma_N1))
    terms = replace(terms, dloss_dlogp_factor_NT=terms.dloss_dlogp_factor_NT * slope_NT)
    return _without_gain(terms, tokens.log_ratio_NT.abs() >= LOG_RATIO_LIMIT)


def gspo_terms(tokens: SurrogateInputs, bounds: ClipBounds) -> SurrogateTerms:
    """All tokens are clipped by the sequence's ratio s = exp(mean_t log rho_t), its geometric mean. (arXiv 2507.18071.)

    An empty sequence has s = 1 and, having no tokens, adds nothing.
    """
    ratio_NT = sequence_ratio(tokens).expand_as(tokens.logps_NT)
    terms = clipped_terms(ratio_NT, tokens.advantages_N1, bounds)
    return _without_gain(terms, tokens.log_ratio_NT.abs() >= LOG_RATIO_LIMIT)


def gspo_token_terms(tokens: SurrogateInputs, bounds: ClipBounds) -> SurrogateTerms:
    """GSPO's value with token gradients: the ratio is sg[s] * pi / sg[pi]. (arXiv 2507.18071.)"""
    token_NT = (tokens.logps_NT - tokens.logps_NT.detach()).exp()
    return clipped_terms(sequence_ratio(tokens).detach() * token_NT, tokens.advantages_N1, bounds)


def cispo_terms(tokens: SurrogateInputs, bounds: ClipBounds) -> SurrogateTerms:
    """-sg[min(rho, cap)] A l: a large ratio loses weight, never its gradient. (MiniMax-M1, arXiv 2506.13585.)"""
    weight_NT = torch.minimum(tokens.log_ratio_NT.detach().exp(), bounds.cispo_cap_N1)
    never_NT = torch.zeros_like(tokens.logps_NT, dtype=torch.bool)
    loss_NT = -weight_NT * tokens.advantages_N1 * tokens.logps_NT
    return SurrogateTerms(
        loss_NT=loss_NT, dloss_dlogp_factor_NT=weight_NT, clipped_low_NT=never_NT, clipped_high_NT=never_NT
    )


def sequence_ratio(tokens: SurrogateInputs) -> Tensor:
    """s = exp((1/T) sum_t log rho_t), one per row."""
    lengths_N1 = tokens.mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
    return (tokens.log_ratio_NT.sum(dim=1, keepdim=True) / lengths_N1).exp()


def kl_k3(logps_NT: Tensor, ref_logps_NT: Tensor) -> Tensor:
    """Unbiased, never negative estimate of KL(pi || ref) in nats: k3 of w = pi_ref / pi. 0 where both agree."""
    return k3(log_ratio(ref_logps_NT, logps_NT))


SURROGATES: dict[LossKind, Callable[[SurrogateInputs, ClipBounds], SurrogateTerms]] = {
    "grpo": grpo_terms,
    "gspo": gspo_terms,
    "gspo_token": gspo_token_terms,
    "cispo": cispo_terms,
}


def _without_gain(terms: SurrogateTerms, cut_NT: Tensor) -> SurrogateTerms:
    return replace(terms, dloss_dlogp_factor_NT=terms.dloss_dlogp_factor_NT.masked_fill(cut_NT, 0.0))
