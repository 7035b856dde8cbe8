"""One forward pass over given responses within the recipe's memory limits, and importance ratios from it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npo_cli.config.recipe import Recipe
from npo_cli.distributed.partition import partition_by_tokens, restore_order
from npo_cli.distributed.process_group import current_group
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.logprobs import TokenRow, micro_batches
from npo_cli.policy.model import Policy
from npo_cli.scoring.variance import SampleRatio
from npo_cli.types.rollouts import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseLogprobs:
    """One response under one forward pass, without padding."""

    logps_T: Tensor
    collisions_T: Tensor
    """sum_v p(v)^2 of the distribution at each token."""
    entropies_T: Tensor
    """Entropy of that distribution (nats)."""

    def to_cpu(self) -> "ResponseLogprobs":
        """Copies on the CPU: a slice would be sent with its whole batch."""
        columns = (self.logps_T, self.collisions_T, self.entropies_T)
        logps_T, collisions_T, entropies_T = (column.cpu().clone() for column in columns)
        return ResponseLogprobs(logps_T=logps_T, collisions_T=collisions_T, entropies_T=entropies_T)


def run_logprob_pass(
    policy: Policy | ExtrapolatedPolicy,
    recipe: Recipe,
    rows: Sequence[TokenRow],
    *,
    temperature: float | None = None,
    uses_full_vocabulary: bool = False,
) -> list[ResponseLogprobs]:
    """Score responses under the current weights, within the recipe's memory limits; no gradients.

    `uses_full_vocabulary`: tokens that the policy never writes keep their probability, as an engine scores them.
    Several ranks score a part of the rows each, and all get all results.
    """
    if uses_full_vocabulary and isinstance(policy, Policy) and policy.vision is not None:
        policy = replace(policy, vision=replace(policy.vision, suppressed_ids=()))
    temperature = recipe.sampling.temperature if temperature is None else temperature
    group, sharding = current_group(), policy.sharding
    if not group.is_launched:
        return _score_rows(policy, recipe, rows, temperature=temperature)
    parts = partition_by_tokens([row.num_tokens for row in rows], group.world_size)
    # With all weights whole, ranks may need different numbers of passes.
    with group.phase("score"), nullcontext() if sharding is None else sharding.unshard_weights(policy.model):
        mine = _score_rows(policy, recipe, [rows[index] for index in parts[group.rank]], temperature=temperature)
        results = group.gather([scores.to_cpu() for scores in mine], phase="score")
    return restore_order(parts, results)


@torch.no_grad()
def _score_rows(
    policy: Policy | ExtrapolatedPolicy, recipe: Recipe, rows: Sequence[TokenRow], *, temperature: float
) -> list[ResponseLogprobs]:
    found = []
    for run in micro_batches(rows, max_tokens=recipe.train.micro_batch_tokens):
        part = [rows[index] for index in run]
        scores = policy.score(part, temperature=temperature, chunk_tokens=recipe.train.logit_chunk_tokens)
        columns = (scores.logps_NT, scores.collisions_NT, scores.entropies_NT)
        for row, logps_T, collisions_T, entropies_T in zip(part, *columns, strict=True):
            length = len(row.response_ids)
            found.append(
                ResponseLogprobs(
                    logps_T=logps_T[:length], collisions_T=collisions_T[:length], entropies_T=entropies_T[:length]
                )
            )
    return found


# Importance ratios of a guide's samples to the learner: what V is computed from

MAX_LOG_RATIO = 20.0


def compute_learner_ratios(
    policy: Policy, recipe: Recipe, samples: Sequence[tuple[Prompt, Rollout]], *, cap: float
) -> list[SampleRatio]:
    """rho_t = learner / behavior policy for every token, summed per sample; the learner's weights must be loaded.

    Every rollout has behavior_logps. |log rho_t| is clipped at 20 nats, so that no token overflows a sum.
    """
    rows = [policy.row(prompt, rollout.response_ids) for prompt, rollout in samples]
    scored = run_logprob_pass(policy, recipe, rows)
    return [_ratio(rollout, scores, cap=cap) for (_, rollout), scores in zip(samples, scored, strict=True)]


def _ratio(rollout: Rollout, scores: ResponseLogprobs, *, cap: float) -> SampleRatio:
    learner_T, collision_T = scores.logps_T.double().cpu(), scores.collisions_T.double().cpu()
    behavior_T = torch.tensor(rollout.behavior_logps, dtype=torch.float64)
    log_rho_T = (learner_T - behavior_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho_T = log_rho_T.exp()
    gradient_T = 1 - 2 * learner_T.exp() + collision_T
    return SampleRatio(
        prompt_id=rollout.prompt_id,
        num_tokens=len(rollout.response_ids),
        log_w=log_rho_T.sum().item(),
        sum_rho2=rho_T.clamp(max=cap).square().sum().item(),
        sum_rho2_grad=(rho_T.square() * gradient_T).sum().item(),
        sum_rho_grad=(rho_T * gradient_T).sum().item(),
        is_correct=rollout.is_correct,
    )
