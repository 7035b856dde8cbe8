"""Importance ratios of a guide's samples to the learner: what V is computed from."""

from collections.abc import Sequence

import torch

from npo_cli.scoring.variance import SampleRatio
from npo_cli.session.logprob_pass import ResponseLogprobs, run_logprob_pass
from npo_cli.session.session import Session
from npo_cli.types.rollouts import Prompt, Rollout

MAX_LOG_RATIO = 20.0


def compute_learner_ratios(
    session: Session, samples: Sequence[tuple[Prompt, Rollout]], *, cap: float
) -> list[SampleRatio]:
    """rho_t = learner / behavior policy for every token, summed per sample; the learner's weights must be loaded.

    Every rollout has behavior_logps. |log rho_t| is clipped at 20 nats, so that no token overflows a sum.
    """
    rows = [session.policy.row(prompt, rollout.response_ids) for prompt, rollout in samples]
    scored = run_logprob_pass(session.policy, session.recipe, rows)
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
