"""One forward pass over given responses, within the recipe's memory limits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npo_cli.config import Recipe
from npo_cli.policy.extrapolated import PushedPolicy
from npo_cli.policy.logprobs import TokenRow, micro_batches
from npo_cli.policy.model import Policy
from npo_cli.stages.shares import Hand, by_tokens, in_order


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScores:
    """What one forward pass says of one response, without padding."""

    logps_T: Tensor
    collisions_T: Tensor
    """sum_v p(v)^2 of the distribution at each token."""
    entropies_T: Tensor
    """Entropy of that distribution (nats)."""

    def to_send(self) -> "RowScores":
        """The same on the CPU and by itself: a slice would take its whole batch along, on a device of its own."""
        columns = (self.logps_T, self.collisions_T, self.entropies_T)
        logps_T, collisions_T, entropies_T = (column.cpu().clone() for column in columns)
        return RowScores(logps_T=logps_T, collisions_T=collisions_T, entropies_T=entropies_T)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """How a forward pass is made."""

    temperature: float
    whole_vocabulary: bool
    """Tokens that the policy never writes have their part of the law too, as an engine scores what it is given."""
    micro_batch_tokens: int
    logit_chunk_tokens: int


def row_scores(
    policy: Policy | PushedPolicy,
    recipe: Recipe,
    rows: Sequence[TokenRow],
    *,
    temperature: float | None = None,
    whole_vocabulary: bool = False,
) -> list[RowScores]:
    """Score responses under the weights at hand, within the recipe's memory limits; no gradients."""
    how = Pass(
        temperature=recipe.sampling.temperature if temperature is None else temperature,
        whole_vocabulary=whole_vocabulary,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        logit_chunk_tokens=recipe.train.logit_chunk_tokens,
    )
    if policy.shared is None:
        return rows_scored(policy, how, rows)
    shares = by_tokens([row.num_tokens for row in rows], policy.shared.team.size)
    pieces = [
        ScoreRows(name=policy.shared.name, bare=policy.bare, how=how, rows=[rows[place] for place in share])
        for share in shares
    ]
    return in_order(shares, policy.shared.team.work(pieces))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRows:
    """One process's share of the rows."""

    name: str
    bare: bool
    how: Pass
    rows: Sequence[TokenRow]
    phase = "score"

    def take_part(self, hand: Hand) -> list[RowScores]:
        """With all weights whole: the processes need not make equally many passes."""
        policy = replace(hand.policies[self.name], bare=self.bare)
        assert policy.shared is not None
        with policy.shared.gathered(policy.model):
            return [scores.to_send() for scores in rows_scored(policy, self.how, self.rows)]


@torch.no_grad()
def rows_scored(policy: Policy | PushedPolicy, how: Pass, rows: Sequence[TokenRow]) -> list[RowScores]:
    """The same in this process alone."""
    if how.whole_vocabulary and isinstance(policy, Policy) and policy.vision is not None:
        policy = replace(policy, vision=replace(policy.vision, silent_ids=()))
    found = []
    for run in micro_batches(rows, max_tokens=how.micro_batch_tokens):
        part = [rows[index] for index in run]
        scores = policy.score(part, temperature=how.temperature, chunk_tokens=how.logit_chunk_tokens)
        columns = (scores.logps_NT, scores.collisions_NT, scores.entropies_NT)
        for row, logps_T, collisions_T, entropies_T in zip(part, *columns, strict=True):
            length = len(row.response_ids)
            found.append(
                RowScores(
                    logps_T=logps_T[:length], collisions_T=collisions_T[:length], entropies_T=entropies_T[:length]
                )
            )
    return found
