"""One forward pass over given responses within the recipe's memory limits, and importance ratios from it."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from npo_cli.config.recipe import Recipe, TrainSettings
from npo_cli.distributed.partition import partition_by_tokens, restore_order
from npo_cli.distributed.process_group import current_group
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.logprobs import Column
from npo_cli.policy.model import Policy
from npo_cli.policy.packing import MicroBatch, TokenRow, plan_passes
from npo_cli.scoring.variance import SampleRatio
from npo_cli.types.rollouts import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseLogprobs:
    """One response under one forward pass, without padding; a column that was not requested is None."""

    logps_T: Tensor
    entropies_T: Tensor | None = None
    """Entropy of the distribution at each token (nats)."""
    collisions_T: Tensor | None = None
    """sum_v p(v)^2 of that distribution."""

    def to_cpu(self) -> "ResponseLogprobs":
        """Copies on the CPU: a slice would be sent with its whole batch."""
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        return ResponseLogprobs(
            **{name: column.cpu().clone() for name, column in columns.items() if column is not None}
        )


def plan_policy_passes(
    policy: Policy | ExtrapolatedPolicy, settings: TrainSettings, rows: Sequence[TokenRow], *, can_share: bool = True
) -> list[MicroBatch]:
    """The forward passes over these rows, within train.micro_batch_tokens.

    `can_share`: whether every other model that reads them can share prompts too.
    """
    costs = policy.packing if settings.share_prompts and can_share else None
    return plan_passes(rows, max_tokens=settings.micro_batch_tokens, costs=costs)


def run_logprob_pass(
    policy: Policy | ExtrapolatedPolicy,
    recipe: Recipe,
    rows: Sequence[TokenRow],
    *,
    temperature: float | None = None,
    columns: Collection[Column] = (),
    uses_full_vocabulary: bool = False,
) -> list[ResponseLogprobs]:
    """Score responses under the current weights, within the recipe's memory limits; no gradients.

    `columns`: what is computed beside log-probabilities.
    `uses_full_vocabulary`: tokens that the policy never writes keep their probability, as an engine scores them.
    Several ranks score a part of the rows each, and all get all results.
    """
    if uses_full_vocabulary and isinstance(policy, Policy) and policy.vision is not None:
        policy = replace(policy, vision=replace(policy.vision, suppressed_ids=()))
    temperature = recipe.sampling.temperature if temperature is None else temperature
    group, sharding = current_group(), policy.sharding
    if not group.is_launched:
        return _score_rows(policy, recipe, rows, temperature=temperature, columns=columns)
    parts = partition_by_tokens([row.num_tokens for row in rows], group.world_size)
    # With all weights whole, ranks may need different numbers of passes.
    with group.phase("score"), nullcontext() if sharding is None else sharding.unshard_weights(policy.model):
        part = [rows[index] for index in parts[group.rank]]
        mine = _score_rows(policy, recipe, part, temperature=temperature, columns=columns)
        results = group.gather([scores.to_cpu() for scores in mine], phase="score")
    return restore_order(parts, results)


@torch.no_grad()
def _score_rows(
    policy: Policy | ExtrapolatedPolicy,
    recipe: Recipe,
    rows: Sequence[TokenRow],
    *,
    temperature: float,
    columns: Collection[Column],
) -> list[ResponseLogprobs]:
    found: dict[int, ResponseLogprobs] = {}
    for batch in plan_policy_passes(policy, recipe.train, rows):
        scores = policy.score(
            [rows[index] for index in batch.indices],
            temperature=temperature,
            chunk_tokens=recipe.train.logit_chunk_tokens,
            columns=columns,
            pack_sizes=batch.pack_sizes,
        )
        for place, index in enumerate(batch.indices):
            token = (place, slice(len(rows[index].response_ids)))
            found[index] = ResponseLogprobs(
                logps_T=scores.logps_NT[token],
                entropies_T=None if scores.entropies_NT is None else scores.entropies_NT[token],
                collisions_T=None if scores.collisions_NT is None else scores.collisions_NT[token],
            )
    return [found[index] for index in range(len(rows))]


# Importance ratios of a guide's samples to the learner: what V is computed from

MAX_LOG_RATIO = 20.0


def compute_learner_ratios(
    policy: Policy, recipe: Recipe, samples: Sequence[tuple[Prompt, Rollout]], *, cap: float
) -> list[SampleRatio]:
    """rho_t = learner / behavior policy for every token, summed per sample; the learner's weights must be loaded.

    Every rollout has behavior_logps. |log rho_t| is clipped at 20 nats, so that no token overflows a sum.
    """
    rows = [policy.row(prompt, rollout.response_ids) for prompt, rollout in samples]
    scored = run_logprob_pass(policy, recipe, rows, columns=["collisions"])
    return [_ratio(rollout, scores, cap=cap) for (_, rollout), scores in zip(samples, scored, strict=True)]


def _ratio(rollout: Rollout, scores: ResponseLogprobs, *, cap: float) -> SampleRatio:
    assert scores.collisions_T is not None
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
