"""Advantages from rewards.

P prompts, G rollouts per prompt, N = P * G rows. There is no value network and no per-token credit: every token of a
response has the advantage of its response, whatever policy sampled it.
"""

import torch
from torch import Tensor

ROUNDING = 16
"""Rewards that differ by at most this many units of rounding count as equal."""


def group_advantages(
    rewards_PG: Tensor, *, divide_by_std: bool, eps: float, baseline_PG: Tensor | None = None
) -> Tensor:
    """A = (r - mean) / (std + eps) over the group, std with ddof 1; without the std for Dr.GRPO.

    A group with equal rewards, or of one rollout, yields exact zeros: dividing the rounding error of its mean by eps
    would give it a gradient. (GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783.)
    `baseline_PG`: True where a response counts in mean and deviation, at least one per group; None: everywhere.
    """
    if not rewards_PG.is_floating_point():
        rewards_PG = rewards_PG.float()
    if baseline_PG is not None:
        return _advantages_over(rewards_PG, baseline_PG.bool(), divide_by_std=divide_by_std, eps=eps)
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if divide_by_std:
        variance_P1 = advantages_PG.square().sum(dim=1, keepdim=True) / max(rewards_PG.shape[1] - 1, 1)
        advantages_PG = advantages_PG / (variance_P1.sqrt() + eps)
    return advantages_PG.masked_fill(_has_equal_rewards_P1(rewards_PG), 0.0)


def overlong_penalty(lengths_N: Tensor, *, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """Penalty of long responses: min(0, -(T - (L_max - L_buf)) / L_buf * penalty), T capped at L_max.

    In units of reward, from 0 where the buffer starts to -penalty at the limit. A buffer of 0 tokens penalises
    nothing. (Overlong shaping of DAPO, arXiv 2503.14476.)
    """
    if buffer == 0:
        return torch.zeros(lengths_N.shape, device=lengths_N.device)
    excess_N = lengths_N.clamp(max=max_tokens).float() - (max_tokens - buffer)
    return -(excess_N / buffer).clamp(min=0.0) * penalty


def _advantages_over(rewards_PG: Tensor, baseline_PG: Tensor, *, divide_by_std: bool, eps: float) -> Tensor:
    """Mean and deviation over part of each group. Where that part has equal rewards its deviation is 0, and the
    advantages of the others are not divided: (r - mean) / eps would dominate the batch.
    """
    count_P1 = baseline_PG.sum(dim=1, keepdim=True)
    mean_P1 = torch.where(baseline_PG, rewards_PG, 0.0).sum(dim=1, keepdim=True) / count_P1
    advantages_PG = rewards_PG - mean_P1
    if divide_by_std:
        squares_P1 = torch.where(baseline_PG, advantages_PG.square(), 0.0).sum(dim=1, keepdim=True)
        std_P1 = (squares_P1 / (count_P1 - 1).clamp(min=1)).sqrt()
        advantages_PG = torch.where(std_P1 > eps, advantages_PG / (std_P1 + eps), advantages_PG)
    return advantages_PG.masked_fill(_has_equal_rewards_P1(rewards_PG), 0.0)


def _has_equal_rewards_P1(rewards_PG: Tensor) -> Tensor:
    spread_P1 = rewards_PG.amax(dim=1, keepdim=True) - rewards_PG.amin(dim=1, keepdim=True)
    scale_P1 = rewards_PG.abs().amax(dim=1, keepdim=True)
    return spread_P1 <= ROUNDING * torch.finfo(rewards_PG.dtype).eps * scale_P1
