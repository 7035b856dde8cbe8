"""From rewards to advantages: what each response gets credit for.

P prompts, G rollouts per prompt, N = P * G rows. It does not know who wrote a row. There is no value network
and no per-token credit: every token of a response shares the advantage of its response.
"""

import torch
from torch import Tensor

ROUNDING = 16
"""Rewards this many units of rounding apart count as equal."""


def group_advantages(
    rewards_PG: Tensor, *, divide_by_std: bool, eps: float, baseline_PG: Tensor | None = None
) -> Tensor:
    """How far a response beats its group: A = (r - mean) / (std + eps), std with ddof 1; Dr.GRPO leaves the std out.

    A unanimous group, or a group of one, yields exact zeros: it has nothing to teach, and dividing the rounding
    error of its mean by eps would invent a lesson. (GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783.)
    `baseline_PG`: True where a response counts in mean and deviation, at least once a group; None is everywhere.
    """
    if not rewards_PG.is_floating_point():
        rewards_PG = rewards_PG.float()
    if baseline_PG is not None:
        return _advantages_over(rewards_PG, baseline_PG.bool(), divide_by_std=divide_by_std, eps=eps)
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if divide_by_std:
        variance_P1 = advantages_PG.square().sum(dim=1, keepdim=True) / max(rewards_PG.shape[1] - 1, 1)
        advantages_PG = advantages_PG / (variance_P1.sqrt() + eps)
    return advantages_PG.masked_fill(_unanimous_P1(rewards_PG), 0.0)


def overlong_penalty(lengths_N: Tensor, *, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """What a response loses for running long: min(0, -(T - (L_max - L_buf)) / L_buf * penalty), T capped at L_max.

    In units of reward, from 0 where the buffer starts to -penalty at the limit. A buffer of 0 tokens penalises
    nothing. (Overlong shaping of DAPO, arXiv 2503.14476.)
    """
    if buffer == 0:
        return torch.zeros(lengths_N.shape, device=lengths_N.device)
    excess_N = lengths_N.clamp(max=max_tokens).float() - (max_tokens - buffer)
    return -(excess_N / buffer).clamp(min=0.0) * penalty


def _advantages_over(rewards_PG: Tensor, baseline_PG: Tensor, *, divide_by_std: bool, eps: float) -> Tensor:
    """The same over part of each group. Where that part is unanimous its deviation is 0, and the others' advantage is
    left undivided: (r - mean) / eps would drown the batch.
    """
    count_P1 = baseline_PG.sum(dim=1, keepdim=True)
    mean_P1 = torch.where(baseline_PG, rewards_PG, 0.0).sum(dim=1, keepdim=True) / count_P1
    advantages_PG = rewards_PG - mean_P1
    if divide_by_std:
        squares_P1 = torch.where(baseline_PG, advantages_PG.square(), 0.0).sum(dim=1, keepdim=True)
        std_P1 = (squares_P1 / (count_P1 - 1).clamp(min=1)).sqrt()
        advantages_PG = torch.where(std_P1 > eps, advantages_PG / (std_P1 + eps), advantages_PG)
    return advantages_PG.masked_fill(_unanimous_P1(rewards_PG), 0.0)


def _unanimous_P1(rewards_PG: Tensor) -> Tensor:
    spread_P1 = rewards_PG.amax(dim=1, keepdim=True) - rewards_PG.amin(dim=1, keepdim=True)
    scale_P1 = rewards_PG.abs().amax(dim=1, keepdim=True)
    return spread_P1 <= ROUNDING * torch.finfo(rewards_PG.dtype).eps * scale_P1
