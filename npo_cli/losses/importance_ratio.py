"""Importance ratios: rho = pi_theta / pi_anchor per token, and what off-policy tokens are anchored on.

N rows (responses), T tokens. On-policy tokens are anchored on the old policy, with weight 1. Off-policy tokens are
anchored by the `ImportanceRatio` that `guide.inject.ratio` names. Ratios are per token: they ignore the probability of
the prefix and the constant of keeping only correct guide responses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_cli.config.guides import InjectSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.registry import IMPORTANCE_RATIOS

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 nats, beyond which exp is noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLogps:
    """Log-probabilities of the same tokens under three policies, detached and zero outside the mask."""

    current_NT: Tensor
    old_NT: Tensor
    behavior_NT: Tensor
    """NaN where unavailable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioAnchor:
    """How off-policy tokens enter the loss. Nothing in it carries a gradient."""

    logps_NT: Tensor
    """Log-probability under the policy in the denominator."""
    weight_NT: Tensor | float = 1.0
    """Factor on the token's policy loss, after clipping."""
    is_unclipped: bool = False
    """Whether clips and caps do not apply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceRatio:
    """One value of `guide.inject.ratio`, listed in `npo_cli.registry.IMPORTANCE_RATIOS`."""

    name: str
    anchor: Callable[[PolicyLogps, InjectSettings], RatioAnchor]
    needs_logprobs: bool
    """Whether it reads the behavior policy's log-probabilities."""

    def compute_anchor(self, logps: PolicyLogps, settings: InjectSettings) -> RatioAnchor:
        """The anchor of every token, off-policy or not. Raises RunFailed if the function does not return one."""
        anchor = self.anchor(logps, settings)
        if not isinstance(anchor, RatioAnchor) or anchor.logps_NT.shape != logps.old_NT.shape:
            raise RunFailed(
                f"guide.inject.ratio={self.name} returned no RatioAnchor with a log-probability per token",
                "return RatioAnchor(logps_NT=...) of the shape of logps.old_NT",
            )
        return anchor


def importance_ratio(
    name: str, *, needs_logprobs: bool
) -> Callable[[Callable[[PolicyLogps, InjectSettings], RatioAnchor]], ImportanceRatio]:
    """Decorator that makes an anchor function an `ImportanceRatio`."""
    return lambda anchor: ImportanceRatio(name=name, anchor=anchor, needs_logprobs=needs_logprobs)


def check_ratio_available(name: str, *, has_logprobs: bool, guide: str) -> None:
    """Raise NpoError if the ratio reads log-probabilities that the guide does not have."""
    if has_logprobs or not IMPORTANCE_RATIOS.get(name).needs_logprobs:
        return
    raise NpoError(
        f"{guide} has no log-probabilities: guide.inject.ratio={name} is not available",
        f"use guide.inject.ratio={name_ratios_without_logprobs()}",
    )


def name_ratios_without_logprobs() -> str:
    """The ratios that every guide can be used with: `proximal, unit or none`."""
    *names, last = [name for name in IMPORTANCE_RATIOS.built_in if not IMPORTANCE_RATIOS.get(name).needs_logprobs]
    return f"{', '.join(names)} or {last}"


def log_ratio(logps_NT: Tensor, anchor_logps_NT: Tensor) -> Tensor:
    """log rho = l - l_anchor in nats, clamped to +-20; a clamped token gets no gradient through rho."""
    return (logps_NT - anchor_logps_NT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def k3(log_weight_NT: Tensor) -> Tensor:
    """w - 1 - log w of w = p / q: never negative, 0 at w = 1; its mean over samples of q is KL(q || p), in nats.

    (Schulman 2020, joschu.net/blog/kl-approx.)
    """
    # exp(x) - 1 would lose small x to rounding.
    return log_weight_NT.expm1() - log_weight_NT


@importance_ratio("exact", needs_logprobs=True)
def exact_ratio(logps: PolicyLogps, _settings: InjectSettings) -> RatioAnchor:
    """Behavior policy: rho = pi_theta / pi_behavior, clipped like any other. The NPO paper's ratio."""
    return RatioAnchor(logps_NT=logps.behavior_NT)


@importance_ratio("proximal", needs_logprobs=False)
def proximal_ratio(logps: PolicyLogps, _settings: InjectSettings) -> RatioAnchor:
    """Old policy, as if the policy had sampled the token: rho = pi_theta / pi_old (RLEP; NPO without correction)."""
    return RatioAnchor(logps_NT=logps.old_NT)


@importance_ratio("decoupled", needs_logprobs=True)
def decoupled_ratio(logps: PolicyLogps, settings: InjectSettings) -> RatioAnchor:
    """Old policy, with weight min(pi_old / pi_behavior, C) (decoupled PPO, arXiv 2110.00641)."""
    weight_NT = log_ratio(logps.old_NT, logps.behavior_NT).exp().clamp(max=settings.decoupled_cap)
    return RatioAnchor(logps_NT=logps.old_NT, weight_NT=weight_NT)


@importance_ratio("unit", needs_logprobs=False)
def unit_ratio(logps: PolicyLogps, _settings: InjectSettings) -> RatioAnchor:
    """Denominator 1: rho = pi_theta (LUFFY, arXiv 2504.14945, eq. 6)."""
    return RatioAnchor(logps_NT=torch.zeros_like(logps.current_NT))


@importance_ratio("none", needs_logprobs=False)
def no_ratio(logps: PolicyLogps, _settings: InjectSettings) -> RatioAnchor:
    """Score function -A log pi_theta, never clipped: anchored on itself, rho is 1 with gradient grad l."""
    return RatioAnchor(logps_NT=logps.current_NT, is_unclipped=True)
