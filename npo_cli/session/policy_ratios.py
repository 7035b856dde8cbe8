"""Samples of a guide, seen by the learner: what V is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from npo_cli.scoring.variance import SampleRatio
from npo_cli.session.logprob_pass import ResponseLogprobs, run_logprob_pass
from npo_cli.session.session import Session
from npo_cli.types.rollouts import Prompt, Rollout

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateSample:
    """One verified sample of one arm of a scoring, with the arm's own log-probabilities."""

    candidate: int
    """Step of the checkpoint that wrote it; -1 for the first look at the learner; below that, an outside source."""
    prompt_id: str
    slot: int
    response_ids: tuple[int, ...]
    logps: tuple[float, ...] | None
    """Under the arm's weights, from the trainer's forward pass; None where nobody knows them."""
    is_correct: bool
    """Verified correct and ended by itself."""

    @classmethod
    def from_rollout(cls, arm: int, rollout: Rollout, logps: tuple[float, ...] | None) -> "CandidateSample":
        """What scoring keeps of a rollout."""
        return cls(
            candidate=arm,
            prompt_id=rollout.prompt_id,
            slot=rollout.slot,
            response_ids=rollout.response_ids,
            logps=logps,
            is_correct=rollout.verdict == "correct" and rollout.finished,
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "CandidateSample":
        """Read back from the run directory."""
        logps = row["logps"] if row["logps"] is None else tuple(row["logps"])
        return cls(**{**row, "response_ids": tuple(row["response_ids"]), "logps": logps})

    def to_row(self) -> dict[str, Any]:
        """As written to the run directory."""
        return asdict(self)


def compute_learner_ratios(
    session: Session, asked: Sequence[tuple[Prompt, CandidateSample]], *, cap: float
) -> list[SampleRatio]:
    """rho_t = learner / guide of every token, summed up as the V kinds need it; the learner's weights are loaded.

    |log rho_t| is cut at 20 nats, so that one token cannot overflow a sum.
    """
    rows = [session.policy.row(prompt, sample.response_ids) for prompt, sample in asked]
    scored = run_logprob_pass(session.policy, session.recipe, rows)
    return [_ratio(sample, scores, cap=cap) for (_, sample), scores in zip(asked, scored, strict=True)]


def _ratio(sample: CandidateSample, scores: ResponseLogprobs, *, cap: float) -> SampleRatio:
    learner_T, collision_T = scores.logps_T.double().cpu(), scores.collisions_T.double().cpu()
    log_rho_T = (learner_T - torch.tensor(sample.logps, dtype=torch.float64)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho_T = log_rho_T.exp()
    gradient_T = 1 - 2 * learner_T.exp() + collision_T
    return SampleRatio(
        prompt_id=sample.prompt_id,
        num_tokens=len(sample.response_ids),
        log_w=log_rho_T.sum().item(),
        sum_rho2=rho_T.clamp(max=cap).square().sum().item(),
        sum_rho2_grad=(rho_T.square() * gradient_T).sum().item(),
        sum_rho_grad=(rho_T * gradient_T).sum().item(),
        is_correct=sample.is_correct,
    )
