"""Short spellings of this room's records. N rows, T tokens; the defaults are those of plain GRPO."""

from dataclasses import replace

import torch
from torch import Tensor, tensor, zeros

from npo_cli.losses.advantages import group_advantages
from npo_cli.losses.types import Divisors, LossInputs, LossKnobs, MismatchKnobs

MISMATCH = {"cap": 2.0, "low": 0.5, "high": 5.0, "geo_low": 0.999, "geo_high": 1.001, "k3_max": 0.01}


def mismatch(mode: str, **changes: object) -> MismatchKnobs:
    return MismatchKnobs(mode=mode, **(MISMATCH | changes))


PLAIN = {
    "kind": "grpo",
    "aggregation": "seq_mean_token_mean",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "delta": None,
    "cispo_cap": 5.0,
    "kl_coef": 0.0,
    "entropy_coef": 0.0,
    "ratio": "exact",
    "decoupled_cap": 2.0,
    "shape": "none",
    "gamma": 0.1,
    "mismatch": mismatch("token_tis"),
}


def loss_knobs(**changes: object) -> LossKnobs:
    return LossKnobs(**(PLAIN | changes))


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
    mask_NT = tensor(mask).bool()
    return LossInputs(
        behavior_logps_NT=zeros(mask_NT.shape) if behavior is None else behavior,
        mask_NT=mask_NT,
        advantages_N=tensor(advantages),
        off_policy_N=tensor(is_off_policy if is_off_policy is not None else [0] * len(advantages)).bool(),
        old_logps_NT=old,
    )


def with_matching_engine(rows: LossInputs, logps_NT: Tensor) -> LossInputs:
    """The same rows; the engine that sampled the learner's own saw the trainer's log-probabilities."""
    old_NT = logps_NT.detach() if rows.old_logps_NT is None else rows.old_logps_NT
    behavior_NT = torch.where(rows.off_policy_N[:, None], rows.behavior_logps_NT, old_NT)
    return replace(rows, behavior_logps_NT=behavior_NT)


def divisors_of(rows: LossInputs) -> Divisors:
    num_rows, num_columns = rows.mask_NT.shape
    return Divisors(num_sequences=num_rows, num_tokens=int(rows.mask_NT.sum()), max_tokens=num_columns)
