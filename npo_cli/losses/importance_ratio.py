"""Whom each row is charged to: the policy in the denominator of its importance ratio.

N rows (responses), T tokens. A row the learner wrote itself is always charged to the old policy. For a foreign
row there are five rules, chosen once. Their outcome is data (an anchor, a weight, a freedom), so the loss treats
all rows alike. Token ratios ignore both the law of the prefix and the constant of correct-only filtering.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_cli.losses.types import LossInputs, RatioMode

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 nats, beyond which exp is noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioAnchor:
    """How each token enters the loss. Nothing in it carries a gradient."""

    anchor_logps_NT: Tensor
    """Log-probability under the policy in the denominator."""
    weight_NT: Tensor
    """Factor on the token's policy loss, after clipping."""
    unclipped_N1: Tensor
    """True where no clip and no cap applies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLogps:
    """The log-probabilities of the same tokens under three policies, detached and zero outside the mask."""

    current_NT: Tensor
    old_NT: Tensor
    behavior_NT: Tensor


RatioRule = Callable[[PolicyLogps, float], RatioAnchor]


def log_ratio(logps_NT: Tensor, anchor_logps_NT: Tensor) -> Tensor:
    """log rho = l - l_anchor in nats, clamped to +-20; a clamped token gets no gradient through rho."""
    return (logps_NT - anchor_logps_NT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def collect_policy_logps(logps_NT: Tensor, rows: LossInputs) -> PolicyLogps:
    """The three columns of these rows. Without old log-probabilities the current ones stand in."""
    current_NT = logps_NT.detach()
    old_NT = current_NT if rows.old_logps_NT is None else rows.old_logps_NT.detach()
    mask_NT = rows.mask_NT.bool()
    return PolicyLogps(
        current_NT=torch.where(mask_NT, current_NT, 0.0),
        old_NT=torch.where(mask_NT, old_NT, 0.0),
        behavior_NT=torch.where(mask_NT, rows.behavior_logps_NT.detach(), 0.0),
    )


def k3(log_weight_NT: Tensor) -> Tensor:
    """w - 1 - log w of w = p / q: never negative, 0 at w = 1; its mean over samples of q is KL(q || p), in nats.

    (Schulman 2020, joschu.net/blog/kl-approx.)
    """
    # exp(x) - 1 would drown small x in rounding.
    return log_weight_NT.expm1() - log_weight_NT


def make_ratio_anchor(mode: RatioMode, *, decoupled_cap: float) -> Callable[[Tensor, LossInputs], RatioAnchor]:
    """The charging function of one mode: own rows to the old policy with weight 1, foreign rows by the mode's rule."""
    rule = RATIO_RULES[mode]

    def charge(logps_NT: Tensor, rows: LossInputs) -> RatioAnchor:
        columns = collect_policy_logps(logps_NT, rows)
        theirs = rule(columns, decoupled_cap)
        foreign_N1 = rows.off_policy_N.bool()[:, None]
        free_N1 = foreign_N1 & theirs.unclipped_N1
        return RatioAnchor(
            anchor_logps_NT=torch.where(foreign_N1, theirs.anchor_logps_NT, columns.old_NT),
            weight_NT=torch.where(foreign_N1, theirs.weight_NT, 1.0),
            unclipped_N1=free_N1 if rows.unclipped_N is None else free_N1 | rows.unclipped_N.bool()[:, None],
        )

    return charge


def anchor_exact(columns: PolicyLogps, _cap: float) -> RatioAnchor:
    """To the policy that wrote the row: rho = pi_theta / pi_behavior, clipped like any other. The NPO paper's rule."""
    return _bound_charge(columns.behavior_NT)


def anchor_proximal(columns: PolicyLogps, _cap: float) -> RatioAnchor:
    """To the old policy, as if the learner had written it: rho = pi_theta / pi_old (RLEP; NPO without correction)."""
    return _bound_charge(columns.old_NT)


def anchor_decoupled(columns: PolicyLogps, cap: float) -> RatioAnchor:
    """Clip against the old policy, correct apart: weight min(pi_old / pi_behavior, C) (decoupled PPO, 2110.00641)."""
    weight_NT = log_ratio(columns.old_NT, columns.behavior_NT).exp().clamp(max=cap)
    return _bound_charge(columns.old_NT, weight_NT)


def anchor_unit(columns: PolicyLogps, _cap: float) -> RatioAnchor:
    """To nobody: rho = pi_theta / 1, where the writer's probabilities are unknown (LUFFY, arXiv 2504.14945, eq. 6)."""
    return _bound_charge(torch.zeros_like(columns.current_NT))


def anchor_none(columns: PolicyLogps, _cap: float) -> RatioAnchor:
    """Score function -A log pi_theta, weight 1, never clipped: anchored on itself, rho is 1 with gradient grad l."""
    free_N1 = torch.ones_like(columns.current_NT[:, :1], dtype=torch.bool)
    return RatioAnchor(
        anchor_logps_NT=columns.current_NT, weight_NT=torch.ones_like(columns.current_NT), unclipped_N1=free_N1
    )


RATIO_RULES: dict[RatioMode, RatioRule] = {
    "exact": anchor_exact,
    "proximal": anchor_proximal,
    "decoupled": anchor_decoupled,
    "unit": anchor_unit,
    "none": anchor_none,
}


def _bound_charge(anchor_NT: Tensor, weight_NT: Tensor | None = None) -> RatioAnchor:
    return RatioAnchor(
        anchor_logps_NT=anchor_NT,
        weight_NT=torch.ones_like(anchor_NT) if weight_NT is None else weight_NT,
        unclipped_N1=torch.zeros_like(anchor_NT[:, :1], dtype=torch.bool),
    )
