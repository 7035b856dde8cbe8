"""The policy loss: ratio and weight per token, surrogate (GRPO, GSPO, CISPO), aggregation, loss terms.

N rows (responses), T tokens; an axis of length 1 broadcasts.
L = AGG[weight * surrogate] + sum over terms of coefficient * AGG[term], to be minimized. The weight is that of the
importance ratio on off-policy tokens and of the inference/trainer mismatch on on-policy ones, times a dense target's
token weight; it does not reach the loss terms (KL, entropy, a dense target's divergence). A surrogate does not know
which policy sampled a token: tokens that must not be clipped are marked in `TokenColumns.unclipped_NT`.

Every aggregation divides by sizes of the whole optimizer batch, never of the micro-batch, so the losses of
micro-batches add up to the same sum however the batch is split. A row with an empty mask adds 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from npo_cli.config.engine import MismatchSettings
from npo_cli.config.guides import InjectSettings
from npo_cli.config.recipe import LossSettings
from npo_cli.config.target import TargetSettings
from npo_cli.losses.importance_ratio import LOG_RATIO_LIMIT, ImportanceRatio, PolicyLogps, k3, log_ratio
from npo_cli.losses.inference_mismatch import MismatchCorrection, correct_mismatch, measure_mismatch
from npo_cli.losses.target import Target, TokenFactors
from npo_cli.losses.types import Divisors, LossInputs, LossStats, MismatchStats, TargetInputs, TokenColumns
from npo_cli.registry import IMPORTANCE_RATIOS, TARGETS


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


def entropy(tokens: TokenColumns) -> Tensor:
    """Entropy of the policy's distribution in nats."""
    assert tokens.entropies_NT is not None
    return tokens.entropies_NT


LOSS_TERMS: dict[str, LossTerm] = {
    "kl": LossTerm(coefficient=lambda settings: settings.kl_coef, per_token=kl_to_reference, requires="ref_logps_NT"),
    "entropy": LossTerm(
        coefficient=lambda settings: -settings.entropy_coef,
        per_token=entropy,
        requires="entropies_NT",
    ),
}
"""A new term is one entry here and one coefficient in `LossSettings`."""


def has_loss_terms(settings: LossSettings) -> bool:
    """Whether any term beside the surrogate is in the loss; rows with A = 0 then have a gradient too."""
    return any(term.coefficient(settings) for term in LOSS_TERMS.values())


def needs_entropies(settings: LossSettings) -> bool:
    """Whether a term of the loss reads the entropies."""
    return any(term.coefficient(settings) and term.requires == "entropies_NT" for term in LOSS_TERMS.values())


NO_TARGET = TargetSettings()


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
        target: TargetInputs | None = None,
    ) -> tuple[Tensor, LossStats]: ...


def make_policy_loss(
    loss: LossSettings,
    inject: InjectSettings,
    mismatch: MismatchSettings,
    target_settings: TargetSettings = NO_TARGET,
) -> PolicyLoss:
    """The loss function of these settings.

    A row with an empty mask, or A = 0, adds no policy loss. The reference may be given without a KL term, to measure
    the KL. Rows without `target` have no dense target.
    """
    surrogate, ratio = SURROGATES[loss.kind], IMPORTANCE_RATIOS.get(inject.ratio)
    kind: Target = TARGETS.get(target_settings.kind)
    terms = {name: term for name, term in LOSS_TERMS.items() if term.coefficient(loss)}

    def policy_loss(
        logps_NT: Tensor,
        inputs: LossInputs,
        *,
        divisors: Divisors,
        ref_logps_NT: Tensor | None = None,
        entropies_NT: Tensor | None = None,
        target: TargetInputs | None = None,
    ) -> tuple[Tensor, LossStats]:
        total = partial(aggregate, mask_NT=inputs.mask_NT, how=loss.aggregation, divisors=divisors)
        tokens, correction = compute_columns(
            logps_NT,
            inputs,
            ratio,
            inject,
            mismatch,
            ref_logps_NT,
            entropies_NT,
            clips_behavior_ratio=loss.old_policy == "behavior",
        )
        factors = None if target is None else kind.compute_factors(tokens, target, target_settings)
        if factors is not None:
            tokens = replace(tokens, weight_NT=tokens.weight_NT * factors.factor_NT)
        policy = surrogate(tokens, loss)
        value = total(tokens.weight_NT * policy.loss_NT)
        for name, term in terms.items():
            assert term.requires is None or getattr(tokens, term.requires) is not None, f"{name} needs {term.requires}"
            value = value + term.coefficient(loss) * total(term.per_token(tokens))
        stats = _measure(tokens, policy, correction, total)
        if target is None:
            return value, stats
        term_NT = kind.compute_term(tokens, target)
        if term_NT is not None:
            value = value + target.coefficient * total(term_NT)
        return value, stats + _measure_target(tokens, target, factors)

    return policy_loss


def make_sft_loss(loss: LossSettings) -> PolicyLoss:
    """Negative log-likelihood of the trained tokens, aggregated like a policy loss: supervised fine-tuning.

    Advantages, ratios, clipping and the loss terms do not apply.
    """

    def sft_loss(
        logps_NT: Tensor,
        inputs: LossInputs,
        *,
        divisors: Divisors,
        ref_logps_NT: Tensor | None = None,
        entropies_NT: Tensor | None = None,
        target: TargetInputs | None = None,
    ) -> tuple[Tensor, LossStats]:
        value = aggregate(-logps_NT, inputs.mask_NT, how=loss.aggregation, divisors=divisors)
        return value, LossStats()

    return sft_loss


def compute_columns(
    logps_NT: Tensor,
    inputs: LossInputs,
    ratio: ImportanceRatio,
    inject: InjectSettings,
    mismatch: MismatchSettings,
    ref_logps_NT: Tensor | None = None,
    entropies_NT: Tensor | None = None,
    *,
    clips_behavior_ratio: bool = False,
) -> tuple[TokenColumns, MismatchCorrection]:
    """Ratio, weight and clipping of every token. Without old log-probabilities the current ones stand in.

    `clips_behavior_ratio` (loss.old_policy=behavior): the ratio of an on-policy token is pi_theta / mu with weight 1,
    and the mismatch is only measured.
    """
    # Padding may hold anything, NaN too: it is replaced before the first exp, or its gradient would be 0 * NaN.
    mask_NT = inputs.mask_NT.bool()
    off_policy_NT = mask_NT & inputs.off_policy_NT.bool()
    logps_NT = torch.where(mask_NT, logps_NT, 0.0)
    current_NT = logps_NT.detach()
    old_NT = current_NT if inputs.old_logps_NT is None else torch.where(mask_NT, inputs.old_logps_NT.detach(), 0.0)
    behavior_NT = torch.where(mask_NT, inputs.behavior_logps_NT.detach(), 0.0)
    anchor = ratio.compute_anchor(PolicyLogps(current_NT=current_NT, old_NT=old_NT, behavior_NT=behavior_NT), inject)
    mode = mismatch.model_copy(update={"mode": "off"}) if clips_behavior_ratio else mismatch
    correction = correct_mismatch(old_NT, behavior_NT, mask_NT & ~off_policy_NT, mode)
    on_policy_anchor_NT = behavior_NT if clips_behavior_ratio else old_NT
    unclipped_NT = off_policy_NT if anchor.is_unclipped else torch.zeros_like(mask_NT)
    if inputs.unclipped_NT is not None:
        unclipped_NT = unclipped_NT | inputs.unclipped_NT.bool()
    weight_NT = torch.where(off_policy_NT, anchor.weight_NT, correction.weight_NT)
    if inputs.token_weights_NT is not None:
        weight_NT = weight_NT * inputs.token_weights_NT
    tokens = TokenColumns(
        logps_NT=logps_NT,
        log_ratio_NT=log_ratio(logps_NT, torch.where(off_policy_NT, anchor.logps_NT, on_policy_anchor_NT)),
        weight_NT=weight_NT,
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


@torch.no_grad()
def _measure_target(tokens: TokenColumns, target: TargetInputs, factors: TokenFactors | None) -> LossStats:
    """Divergence from the teacher, and the token weights; with log-probabilities only the k3 estimate of KL(policy ||
    teacher)."""
    mask_NT = tokens.mask_NT
    kl_NT = target.divergences_NT
    if kl_NT is None:
        assert target.teacher_logps_NT is not None
        kl_NT = k3(log_ratio(target.teacher_logps_NT, tokens.logps_NT))
    sums = {"target_tokens": mask_NT.sum(), "target_kl_sum": torch.where(mask_NT, kl_NT, 0.0).sum()}
    if factors is not None:
        sums |= {
            "target_weighted_tokens": mask_NT.sum(),
            "target_weight_sum": torch.where(mask_NT, factors.weight_NT, 0.0).sum(),
            "target_weights_clipped": (mask_NT & factors.clipped_NT).sum(),
        }
    numbers = torch.stack([each.double() for each in sums.values()]).tolist()
    return LossStats(**dict(zip(sums, numbers, strict=True)))


def _bound(value: float | None, tokens: TokenColumns, *, unbounded: float = math.inf) -> Tensor:
    """The setting per token; unbounded where the token is not clipped or the setting is off."""
    return torch.where(tokens.unclipped_NT, unbounded, unbounded if value is None else value)


def _cut_clamped(terms: SurrogateTerms, tokens: TokenColumns) -> SurrogateTerms:
    """A log-ratio at its limit of 20 nats passes no gradient."""
    clamped_NT = tokens.log_ratio_NT.abs() >= LOG_RATIO_LIMIT
    return replace(terms, gradient_factor_NT=terms.gradient_factor_NT.masked_fill(clamped_NT, 0.0))
