"""Loss settings, loss inputs and token columns in short. N rows, T tokens; the defaults are those of plain GRPO."""

from dataclasses import replace

import torch
from torch import Tensor, tensor, zeros

from npo_cli.config.engine import MismatchSettings
from npo_cli.config.guides import InjectSettings
from npo_cli.config.recipe import LossSettings
from npo_cli.losses.advantages import group_advantages
from npo_cli.losses.policy_loss import PolicyLoss, make_policy_loss
from npo_cli.losses.types import Divisors, LossInputs


def mismatch_settings(mode: str, **changes: object) -> MismatchSettings:
    """Not validated: tests put bounds where settings do not allow them."""
    return MismatchSettings().model_copy(update={"mode": mode} | changes)


def make_loss(*, mismatch: MismatchSettings | None = None, **changes: object) -> PolicyLoss:
    """The loss with these settings of `loss.*` and `guide.inject.*`."""
    inject = {name: value for name, value in changes.items() if name in InjectSettings.model_fields}
    loss = {name: value for name, value in changes.items() if name not in inject}
    return make_policy_loss(LossSettings(**loss), InjectSettings(**inject), mismatch or mismatch_settings("token_tis"))


def plain_advantages(rewards_PG: Tensor, *, divide_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    return group_advantages(rewards_PG, divide_by_std=divide_by_std, eps=eps)


def make_rows(
    advantages: list[float],
    *,
    mask: list[list[int]],
    behavior: Tensor | None = None,
    old: Tensor | None = None,
    is_off_policy: list[int] | None = None,
) -> LossInputs:
    """Rows that are off-policy as a whole or not at all."""
    mask_NT = tensor(mask).bool()
    off_policy_N = tensor(is_off_policy if is_off_policy is not None else [0] * len(advantages)).bool()
    return LossInputs(
        behavior_logps_NT=zeros(mask_NT.shape) if behavior is None else behavior,
        mask_NT=mask_NT,
        advantages_N=tensor(advantages),
        off_policy_NT=off_policy_N[:, None].expand(mask_NT.shape),
        old_logps_NT=old,
    )


def with_matching_engine(rows: LossInputs, logps_NT: Tensor) -> LossInputs:
    """The same rows; the engine's log-probabilities of on-policy tokens are the trainer's."""
    old_NT = logps_NT.detach() if rows.old_logps_NT is None else rows.old_logps_NT
    return replace(rows, behavior_logps_NT=torch.where(rows.off_policy_NT, rows.behavior_logps_NT, old_NT))


def divisors_of(rows: LossInputs) -> Divisors:
    num_rows, num_columns = rows.mask_NT.shape
    return Divisors(num_sequences=num_rows, num_tokens=int(rows.mask_NT.sum()), max_tokens=num_columns)
