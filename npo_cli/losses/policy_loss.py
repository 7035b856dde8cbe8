"""The policy loss: charge each row, take the surrogate of each token, weigh it, add up.

N rows (responses), T tokens. L = AGG[weight * surrogate] + kl_coef * AGG[k3] - entropy_coef * AGG[entropy], to be
minimised. It does not know why a row is foreign. The weight is that of the charge on foreign rows, and on own rows
that of the engine's mismatch; neither reaches the KL and entropy terms.

From token losses to one number. N rows (responses), T tokens.

Every rule divides by sizes of the whole optimiser batch, never of the micro-batch at hand, so that the parts
add up to the whole however it was split. A row with an empty mask adds 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from npo_cli.losses.importance_ratio import log_ratio, make_ratio_anchor
from npo_cli.losses.inference_mismatch import MismatchCorrection, make_correction, measure_mismatch
from npo_cli.losses.stats import MismatchStats
from npo_cli.losses.surrogates import SURROGATES, SurrogateInputs, SurrogateTerms, kl_k3, make_clip_bounds
from npo_cli.losses.types import Aggregation, Divisors, LossInputs, LossKnobs, LossStats


def aggregate(loss_NT: Tensor, mask_NT: Tensor, *, how: Aggregation, divisors: Divisors) -> Tensor:
    """This micro-batch's share of the batch's loss, in the unit of `loss_NT`. Tokens outside the mask are not read."""
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


AGGREGATIONS: dict[Aggregation, Callable[[Tensor, Tensor, Divisors], Tensor]] = {
    "seq_mean_token_mean": sequence_mean_token_mean,
    "token_mean": token_mean,
    "seq_mean_token_sum_norm": sequence_mean_token_sum,
}


class PolicyLoss(Protocol):
    """Loss of one micro-batch: its share of the batch's loss, and what was measured on the way."""

    def __call__(
        self,
        logps_NT: Tensor,
        rows: LossInputs,
        *,
        divisors: Divisors,
        ref_logps_NT: Tensor | None = None,
        entropies_NT: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]: ...


def policy_loss(
    logps_NT: Tensor,
    rows: LossInputs,
    *,
    knobs: LossKnobs,
    divisors: Divisors,
    ref_logps_NT: Tensor | None = None,
    entropies_NT: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """`make_policy_loss(knobs)`, made and called once."""
    return make_policy_loss(knobs)(
        logps_NT, rows, divisors=divisors, ref_logps_NT=ref_logps_NT, entropies_NT=entropies_NT
    )


def make_policy_loss(knobs: LossKnobs) -> PolicyLoss:
    """The loss function of these knobs: every choice is made here, once.

    However a batch is split into micro-batches, their losses (and stats) add up to the same sum. A row with an
    empty mask, or A = 0, adds no policy loss. The reference may be given without a KL term, to measure it.
    """
    charge = make_ratio_anchor(knobs.ratio, decoupled_cap=knobs.decoupled_cap)
    correct = make_correction(knobs.mismatch)
    surrogate = SURROGATES[knobs.kind]

    def loss_of(
        logps_NT: Tensor,
        rows: LossInputs,
        *,
        divisors: Divisors,
        ref_logps_NT: Tensor | None = None,
        entropies_NT: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]:
        assert ref_logps_NT is not None or not knobs.kl_coef, "a KL term needs the reference's log-probabilities"
        assert entropies_NT is not None or not knobs.entropy_coef, "an entropy bonus needs entropies"
        total = partial(aggregate, mask_NT=rows.mask_NT, how=knobs.aggregation, divisors=divisors)
        charged, corrected = charge(logps_NT, rows), correct(logps_NT, rows)
        weight_NT = charged.weight_NT * corrected.weight_NT
        tokens = _tokens(logps_NT, rows, charged.anchor_logps_NT)
        terms = surrogate(tokens, make_clip_bounds(charged.unclipped_N1, rows.off_policy_N.bool()[:, None], knobs))
        loss = total(weight_NT * terms.loss_NT)
        kl_NT = None if ref_logps_NT is None else _kl(tokens, ref_logps_NT)
        if knobs.kl_coef:
            loss = loss + knobs.kl_coef * total(kl_NT)
        if knobs.entropy_coef:
            loss = loss - knobs.entropy_coef * total(entropies_NT)
        push_NT = weight_NT * terms.dloss_dlogp_factor_NT * tokens.advantages_N1.abs()
        view = _View(tokens=tokens, terms=terms, push_NT=push_NT, kl_NT=kl_NT, corrected=corrected)
        return loss, _measure(view, rows, total)

    return loss_of


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """What there is to measure once the loss is known."""

    tokens: SurrogateInputs
    terms: SurrogateTerms
    push_NT: Tensor
    kl_NT: Tensor | None
    corrected: MismatchCorrection


def _tokens(logps_NT: Tensor, rows: LossInputs, anchor_logps_NT: Tensor) -> SurrogateInputs:
    # Padding may hold anything, NaN too: it is cut out before the first exp, or its gradient would be 0 * NaN.
    mask_NT = rows.mask_NT.bool()
    logps_NT = torch.where(mask_NT, logps_NT, 0.0)
    return SurrogateInputs(
        logps_NT=logps_NT,
        log_ratio_NT=log_ratio(logps_NT, anchor_logps_NT),
        mask_NT=mask_NT,
        advantages_N1=rows.advantages_N[:, None],
    )


def _kl(tokens: SurrogateInputs, ref_logps_NT: Tensor) -> Tensor:
    return kl_k3(tokens.logps_NT, torch.where(tokens.mask_NT, ref_logps_NT.detach(), 0.0))


@torch.no_grad()
def _measure(view: _View, rows: LossInputs, total: Callable[[Tensor], Tensor]) -> LossStats:
    mask_NT = view.tokens.mask_NT
    foreign_NT = mask_NT & rows.off_policy_N.bool()[:, None]
    own_NT = mask_NT & ~foreign_NT
    known_NT = foreign_NT & ~rows.behavior_logps_NT.isnan()
    behavior_NT = torch.where(known_NT, rows.behavior_logps_NT, 0.0)
    ratio_NT = log_ratio(view.tokens.logps_NT, behavior_NT).exp()
    found = {
        "on_policy_tokens": own_NT.sum(),
        "clipped_low": (own_NT & view.terms.clipped_low_NT).sum(),
        "clipped_high": (own_NT & view.terms.clipped_high_NT).sum(),
        "off_policy_tokens": foreign_NT.sum(),
        "off_policy_tokens_with_gradient": (foreign_NT & (view.push_NT > 0)).sum(),
        "off_policy_tokens_with_logps": known_NT.sum(),
        "ratio_sum": torch.where(known_NT, ratio_NT, 0.0).sum(),
        "ratio_min": torch.where(known_NT, ratio_NT, math.inf).amin(),
        "ratio_max": torch.where(known_NT, ratio_NT, -math.inf).amax(),
        "gradient_magnitude": total(view.push_NT),
        "off_policy_gradient_magnitude": total(torch.where(foreign_NT, view.push_NT, 0.0)),
    }
    if view.kl_NT is not None:
        found |= {"kl_sum": torch.where(own_NT, view.kl_NT, 0.0).sum(), "kl_tokens": own_NT.sum()}
    # One transfer for all of them: each .item() would wait for the device.
    ours = torch.stack([each.double() for each in found.values()])
    numbers = torch.cat([ours, measure_mismatch(view.corrected)]).tolist()
    mismatch = MismatchStats.from_numbers(numbers[len(found) :])
    return LossStats(**dict(zip(found, numbers, strict=False)), mismatch=mismatch)
