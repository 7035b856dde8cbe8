"""From token losses to one number. N rows (responses), T tokens.

Every rule divides by sizes of the whole optimiser batch, never of the micro-batch at hand, so that the parts
add up to the whole however it was split. A row with an empty mask adds 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from npo_cli.objective.batch import Aggregation, Divisors


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
