"""Divergence of a policy's next-token distributions from a teacher's, in nats; differentiable in the policy's logits.

U positions, W vocabulary, K tokens of the teacher. p is the teacher's distribution, q the policy's:

    forward  KL(p || q) = sum_v p (log p - log q)          d / d logits = q - p
    reverse  KL(q || p) = sum_v q (log q - log p)
    js       KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2; at most log 2

With `top_k` the sum is over the teacher's K most probable tokens and one bucket with the rest of the probability: a
lower bound of the divergence over the vocabulary. The caller passes a chunk of positions at a time, so no matrix over
the vocabulary is larger than that.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

TINY = 1e-12
"""Probability of all other tokens where the K most probable ones have all of it, up to rounding."""
DivergenceName = Literal["forward", "reverse", "js"]


def forward_kl(teacher_UW: Tensor, policy_UW: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, `(U,)`."""
    return (teacher_UW.exp() * (teacher_UW - policy_UW)).sum(-1)


def reverse_kl(teacher_UW: Tensor, policy_UW: Tensor) -> Tensor:
    """KL(q || p)."""
    return forward_kl(policy_UW, teacher_UW)


def jensen_shannon(teacher_UW: Tensor, policy_UW: Tensor) -> Tensor:
    """Mean of the divergences of p and q from their mean m."""
    mean_UW = torch.logaddexp(teacher_UW, policy_UW) - math.log(2)
    return (forward_kl(teacher_UW, mean_UW) + forward_kl(policy_UW, mean_UW)) / 2


DIVERGENCES: dict[DivergenceName, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "js": jensen_shannon,
}
"""By the value of `target.divergence`."""


def token_divergence(
    teacher_logits_UW: Tensor, policy_logits_UW: Tensor, *, name: DivergenceName, top_k: int | None = None
) -> Tensor:
    """The divergence at each position, `(U,)`. Where one model's vocabulary is padded further, both are cut to the
    shorter one."""
    width = min(teacher_logits_UW.shape[-1], policy_logits_UW.shape[-1])
    teacher_UW, policy_UW = teacher_logits_UW[:, :width], policy_logits_UW[:, :width]
    if top_k is None or top_k >= width:
        return DIVERGENCES[name](torch.log_softmax(teacher_UW, dim=-1), torch.log_softmax(policy_UW, dim=-1))
    top_UK = teacher_UW.topk(top_k, dim=-1).indices
    return DIVERGENCES[name](_in_buckets(teacher_UW, top_UK), _in_buckets(policy_UW, top_UK))


def top_token_divergence(
    ids_UK: Tensor, teacher_UK: Tensor, policy_logits_UW: Tensor, *, name: DivergenceName
) -> Tensor:
    """The same from log-probabilities of the teacher's K most probable tokens alone; all others have the rest to 1."""
    rest_U1 = (-teacher_UK.logsumexp(-1, keepdim=True).expm1()).clamp(min=TINY).log()
    return DIVERGENCES[name](torch.cat([teacher_UK, rest_U1], dim=-1), _in_buckets(policy_logits_UW, ids_UK))


def _in_buckets(logits_UW: Tensor, top_UK: Tensor) -> Tensor:
    """Log-probabilities of these tokens, and of all others together in the last column."""
    rest_U1 = logits_UW.scatter(1, top_UK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.log_softmax(torch.cat([logits_UW.gather(1, top_UK), rest_U1], dim=-1), dim=-1)
