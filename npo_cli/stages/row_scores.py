"""One forward pass over given responses, within the recipe's memory limits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_cli.config import Recipe
from npo_cli.policy.extrapolated import PushedPolicy
from npo_cli.policy.logprobs import TokenRow, micro_batches
from npo_cli.policy.model import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScores:
    """What one forward pass says of one response, without padding."""

    logps_T: Tensor
    collisions_T: Tensor
    """sum_v p(v)^2 of the distribution at each token."""
    entropies_T: Tensor
    """Entropy of that distribution (nats)."""


@torch.no_grad()
def row_scores(
    policy: Policy | PushedPolicy, recipe: Recipe, rows: Sequence[TokenRow], *, temperature: float | None = None
) -> list[RowScores]:
    """Score responses under the weights at hand, within the recipe's memory limits; no gradients."""
    heat = recipe.sampling.temperature if temperature is None else temperature
    found = []
    for run in micro_batches(rows, max_tokens=recipe.train.micro_batch_tokens):
        part = [rows[index] for index in run]
        scores = policy.score(part, temperature=heat, chunk_tokens=recipe.train.logit_chunk_tokens)
        columns = (scores.logps_NT, scores.collisions_NT, scores.entropies_NT)
        for row, logps_T, collisions_T, entropies_T in zip(part, *columns, strict=True):
            length = len(row.response_ids)
            found.append(
                RowScores(
                    logps_T=logps_T[:length], collisions_T=collisions_T[:length], entropies_T=entropies_T[:length]
                )
            )
    return found
