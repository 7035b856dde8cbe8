"""The policy loss: ratio and weight per token, surrogate, aggregation, loss terms.

N rows (responses), T tokens. L = AGG[weight * surrogate] + sum over terms of coefficient * AGG[term], to be minimized.
The weight is that of the importance ratio on off-policy tokens and of the inference/trainer mismatch on on-policy
ones; neither reaches the loss terms (KL, entropy).

Every aggregation divides by sizes of the whole optimizer batch, never of the micro-batch, so the losses of
micro-batches add up to the same sum however the batch is split. A row with an empty mask adds 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from npo_cli.config.engine import MismatchSettings
from npo_cli.config.guides import InjectSettings
from npo_cli.config.recipe import LossSettings
from npo_cli.losses.importance_ratio import IMPORTANCE_RATIOS, PolicyLogps, k3, log_ratio
from npo_cli.losses.inference_mismatch import MismatchCorrection, correct_mismatch, measure_mismatch
from npo_cli.losses.stats import LossStats, MismatchStats
from npo_cli.losses.surrogates import SURROGATES, SurrogateTerms
from npo_cli.losses.types import Divisors, LossInputs, TokenColumns


def aggregate(loss_NT: Tensor, mask_NT: Tensor, *, how: str, divisors: Divisors) -> Tensor:
    """This micro-batch's part of the batch's loss, in the unit of `loss_NT`. Tokens outside the mask are not read."""
    mask_NT = mask_NT.bool()
    return AGGREGATIONS[how](torch.where(mask_NT, loss_NT, 0.0), mask_NT, divisors)


def sequence_mean_token_mean(loss_NT: Tensor, mask_NT: Tensor, divisors: Divisors) -> Tensor:
    """(1/N) sum_i (1/T_i) sum_t l: every response weighs the same (GRPO, GSPO, NPO)."""
    lengths_N = mask_NT.sum(dim=1).clamp(min=1)
    return (loss_NT.sum(dim=1) / lengths_N).sum() / divisors.num_sequences


def token_mean(loss_NT: Tensor, mask_NT: Tensor, divisors: Divisors) -> Tensor:
    """sum_{i,t} l / number of tokens: every token weighs the same (DAPO, CISPO). A batch without tokens gives 0."""
    return loss_NT.sum() / max(divisors.num_tokens, 1)


def sequence_mean_token_sum(loss_NT: Tensor, mask_NT: Tensor, divisors: Divisors) -> Tensor:
    """(1/N) sum_i sum_t l / L_max, a constant: no response gains by being short or long (Dr.GRPO)."""
    return loss_NT.sum() / (divisors.num_sequences * divisors.max_tokens)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Divisors], Tensor]] = {
    "seq_mean_token_mean": sequence_mean_token_mean,
    "token_mean": token_mean,
    "seq_mean_token_sum_norm": sequence_mean_token_sum,
}
"""By the value of `loss.aggregation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerm:
    """A term beside the surrogate, aggregated like it and not weighted by ratios."""

    coefficient: Callable[[LossSettings], float]
    """Factor in the loss; a term with 0 is not computed."""
    per_token: Callable[[TokenColumns], Tensor]
    requires: Literal["ref_logps_NT", "entropies_NT"] | None = None
    """Column of `TokenColumns` that must be given."""


def kl_to_reference(tokens: TokenColumns) -> Tensor:
    """k3 of w = pi_ref / pi: unbiased, never negative estimate of KL(pi || ref) in nats. 0 where both agree."""
    assert tokens.ref_logps_NT is not None
    return k3(log_ratio(tokens.ref_logps_NT, tokens.logps_NT))


LOSS_TERMS: dict[str, LossTerm] = {
    "kl": LossTerm(coefficient=lambda settings: settings.kl_coef, per_token=kl_to_reference, requires="ref_logps_NT"),
    "entropy": LossTerm(
        coefficient=lambda settings: -settings.entropy_coef,
        per_token=lambda tokens: tokens.entropies_NT,
        requires="entropies_NT",
    ),
}
"""A new term is one entry here and one coefficient in `LossSettings`."""


def has_loss_terms(settings: LossSettings) -> bool:
    """Whether any term beside the surrogate is in the loss; rows with A = 0 then have a gradient too."""
    return any(term.coefficient(settings) for term in LOSS_TERMS.values())


class PolicyLoss(Protocol):
    """Loss of one micro-batch (its part of the batch's loss) and what was measured."""

    def __call__(
        self,
        logps_NT: Tensor,
        inputs: LossInputs,
        *,
        divisors: Divisors,
        ref_logps_NT: Tensor | None = None,
        entropies_NT: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]: ...


def make_policy_loss(loss: LossSettings, inject: InjectSettings, mismatch: MismatchSettings) -> PolicyLoss:
    """The loss function of these settings.

    A row with an empty mask, or A = 0, adds no policy loss. The reference may be given without a KL term, to measure
    the KL.
    """
    surrogate = SURROGATES[loss.kind]
    terms = {name: term for name, term in LOSS_TERMS.items() if term.coefficient(loss)}

    def policy_loss(
        logps_NT: Tensor,
        inputs: LossInputs,
        *,
        divisors: Divisors,
        ref_logps_NT: Tensor | None = None,
        entropies_NT: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]:
        total = partial(aggregate, mask_NT=inputs.mask_NT, how=loss.aggregation, divisors=divisors)
        tokens, correction = compute_columns(logps_NT, inputs, inject, mismatch, ref_logps_NT, entropies_NT)
        policy = surrogate(tokens, loss)
        value = total(tokens.weight_NT * policy.loss_NT)
        for name, term in terms.items():
            assert term.requires is None or getattr(tokens, term.requires) is not None, f"{name} needs {term.requires}"
            value = value + term.coefficient(loss) * total(term.per_token(tokens))
        return value, _measure(tokens, policy, correction, total)

    return policy_loss


def compute_columns(
    logps_NT: Tensor,
    inputs: LossInputs,
    inject: InjectSettings,
    mismatch: MismatchSettings,
    ref_logps_NT: Tensor | None = None,
    entropies_NT: Tensor | None = None,
) -> tuple[TokenColumns, MismatchCorrection]:
    """Ratio, weight and clipping of every token. Without old log-probabilities the current ones stand in."""
    # Padding may hold anything, NaN too: it is replaced before the first exp, or its gradient would be 0 * NaN.
    mask_NT = inputs.mask_NT.bool()
    off_policy_NT = mask_NT & inputs.off_policy_NT.bool()
    logps_NT = torch.where(mask_NT, logps_NT, 0.0)
    current_NT = logps_NT.detach()
    old_NT = current_NT if inputs.old_logps_NT is None else torch.where(mask_NT, inputs.old_logps_NT.detach(), 0.0)
    behavior_NT = torch.where(mask_NT, inputs.behavior_logps_NT.detach(), 0.0)
    anchor = IMPORTANCE_RATIOS[inject.ratio].anchor(
        PolicyLogps(current_NT=current_NT, old_NT=old_NT, behavior_NT=behavior_NT), inject
    )
    correction = correct_mismatch(old_NT, behavior_NT, mask_NT & ~off_policy_NT, mismatch)
    unclipped_NT = off_policy_NT if anchor.is_unclipped else torch.zeros_like(mask_NT)
    if inputs.unclipped_NT is not None:
        unclipped_NT = unclipped_NT | inputs.unclipped_NT.bool()
    tokens = TokenColumns(
        logps_NT=logps_NT,
        log_ratio_NT=log_ratio(logps_NT, torch.where(off_policy_NT, anchor.logps_NT, old_NT)),
        weight_NT=torch.where(off_policy_NT, anchor.weight_NT, correction.weight_NT),
        behavior_logps_NT=behavior_NT,
        mask_NT=mask_NT,
        off_policy_NT=off_policy_NT,
        unclipped_NT=unclipped_NT,
        advantages_N1=inputs.advantages_N[:, None],
        shaping_gamma=inject.shaping_gamma if inject.ratio_shaping == "soft" else None,
        ref_logps_NT=None if ref_logps_NT is None else torch.where(mask_NT, ref_logps_NT.detach(), 0.0),
        entropies_NT=entropies_NT,
    )
    return tokens, correction


@torch.no_grad()
def _measure(
    tokens: TokenColumns, policy: SurrogateTerms, correction: MismatchCorrection, total: Callable[[Tensor], Tensor]
) -> LossStats:
    off_policy_NT, on_policy_NT = tokens.off_policy_NT, correction.on_policy_NT
    size_NT = tokens.weight_NT * policy.gradient_factor_NT * tokens.advantages_N1.abs()
    known_NT = off_policy_NT & ~tokens.behavior_logps_NT.isnan()
    behavior_NT = torch.where(known_NT, tokens.behavior_logps_NT, 0.0)
    ratio_NT = log_ratio(tokens.logps_NT, behavior_NT).exp()
    sums = {
        "on_policy_tokens": on_policy_NT.sum(),
        "clipped_low": (on_policy_NT & policy.clipped_low_NT).sum(),
        "clipped_high": (on_policy_NT & policy.clipped_high_NT).sum(),
        "off_policy_tokens": off_policy_NT.sum(),
        "off_policy_tokens_with_gradient": (off_policy_NT & (size_NT > 0)).sum(),
        "off_policy_tokens_with_logps": known_NT.sum(),
        "ratio_sum": torch.where(known_NT, ratio_NT, 0.0).sum(),
        "ratio_min": torch.where(known_NT, ratio_NT, math.inf).amin(),
        "ratio_max": torch.where(known_NT, ratio_NT, -math.inf).amax(),
        "gradient_magnitude": total(size_NT),
        "off_policy_gradient_magnitude": total(torch.where(off_policy_NT, size_NT, 0.0)),
    }
    if tokens.ref_logps_NT is not None:
        kl_NT = kl_to_reference(tokens)
        sums |= {"kl_sum": torch.where(on_policy_NT, kl_NT, 0.0).sum(), "kl_tokens": on_policy_NT.sum()}
    # One transfer for all of them: each .item() would wait for the device.
    scalars = torch.stack([each.double() for each in sums.values()])
    numbers = torch.cat([scalars, measure_mismatch(correction)]).tolist()
    mismatch = MismatchStats.from_numbers(numbers[len(sums) :])
    return LossStats(**dict(zip(sums, numbers, strict=False)), mismatch=mismatch)
