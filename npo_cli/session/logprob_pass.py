"""One forward pass over given responses, within the recipe's memory limits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npo_cli.config.recipe import Recipe
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.logprobs import TokenRow, micro_batches
from npo_cli.policy.model import Policy
from npo_cli.session.partition import WorkerState, partition_by_tokens, restore_order


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseLogprobs:
    """What one forward pass says of one response, without padding."""

    logps_T: Tensor
    collisions_T: Tensor
    """sum_v p(v)^2 of the distribution at each token."""
    entropies_T: Tensor
    """Entropy of that distribution (nats)."""

    def to_cpu(self) -> "ResponseLogprobs":
        """The same on the CPU and by itself: a slice would take its whole batch along, on a device of its own."""
        columns = (self.logps_T, self.collisions_T, self.entropies_T)
        logps_T, collisions_T, entropies_T = (column.cpu().clone() for column in columns)
        return ResponseLogprobs(logps_T=logps_T, collisions_T=collisions_T, entropies_T=entropies_T)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSettings:
    """How a forward pass is made."""

    temperature: float
    uses_full_vocabulary: bool
    """Tokens that the policy never writes have their part of the law too, as an engine scores what it is given."""
    micro_batch_tokens: int
    logit_chunk_tokens: int


def run_logprob_pass(
    policy: Policy | ExtrapolatedPolicy,
    recipe: Recipe,
    rows: Sequence[TokenRow],
    *,
    temperature: float | None = None,
    uses_full_vocabulary: bool = False,
) -> list[ResponseLogprobs]:
    """Score responses under the weights at hand, within the recipe's memory limits; no gradients."""
    how = PassSettings(
        temperature=recipe.sampling.temperature if temperature is None else temperature,
        uses_full_vocabulary=uses_full_vocabulary,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        logit_chunk_tokens=recipe.train.logit_chunk_tokens,
    )
    if policy.shared is None:
        return run_local_logprob_pass(policy, how, rows)
    shares = partition_by_tokens([row.num_tokens for row in rows], policy.shared.worker_group.world_size)
    pieces = [
        LogprobPassTask(
            name=policy.shared.name,
            is_base_only=policy.is_base_only,
            pass_settings=how,
            rows=[rows[place] for place in share],
        )
        for share in shares
    ]
    return restore_order(shares, policy.shared.worker_group.scatter(pieces))


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobPassTask:
    """One process's share of the rows."""

    name: str
    is_base_only: bool
    pass_settings: PassSettings
    rows: Sequence[TokenRow]
    phase = "score"

    def run(self, hand: WorkerState) -> list[ResponseLogprobs]:
        """With all weights whole: the processes need not make equally many passes."""
        policy = replace(hand.policies[self.name], is_base_only=self.is_base_only)
        assert policy.shared is not None
        with policy.shared.unshard_weights(policy.model):
            return [scores.to_cpu() for scores in run_local_logprob_pass(policy, self.pass_settings, self.rows)]


@torch.no_grad()
def run_local_logprob_pass(
    policy: Policy | ExtrapolatedPolicy, how: PassSettings, rows: Sequence[TokenRow]
) -> list[ResponseLogprobs]:
    """The same in this process alone."""
    if how.uses_full_vocabulary and isinstance(policy, Policy) and policy.vision is not None:
        policy = replace(policy, vision=replace(policy.vision, suppressed_ids=()))
    found = []
    for run in micro_batches(rows, max_tokens=how.micro_batch_tokens):
        part = [rows[index] for index in run]
        scores = policy.score(part, temperature=how.temperature, chunk_tokens=how.logit_chunk_tokens)
        columns = (scores.logps_NT, scores.collisions_NT, scores.entropies_NT)
        for row, logps_T, collisions_T, entropies_T in zip(part, *columns, strict=True):
            length = len(row.response_ids)
            found.append(
                ResponseLogprobs(
                    logps_T=logps_T[:length], collisions_T=collisions_T[:length], entropies_T=entropies_T[:length]
                )
            )
    return found
