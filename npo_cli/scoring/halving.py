"""Sequential halving: which candidates get more prompts within a fixed budget.

All candidates of a round are sampled on the same prompts; samples of earlier rounds stay in use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.errors import NpoError
from npo_cli.types.scores import CandidateScore


@dataclass(frozen=True, kw_only=True, slots=True)
class HalvingRound:
    """One round of sequential halving."""

    num_candidates: int
    """Candidates that are left."""
    prompts_per_candidate: int
    """New prompts of this round, beside those of all earlier rounds."""


def halving_rounds(num_candidates: int, budget: int) -> list[HalvingRound]:
    """ceil(log2 K) rounds share T (candidate, prompt) pairs equally: floor(T/(|S_r| ceil(log2 K))) per candidate.

    K = 8, T = 480: 8 candidates x 20 new prompts, 4 x 40, 2 x 80; the finalists have 20 + 40 + 80 = 140. After each
    round the better half (rounded up) stays. One candidate alone has one round, the whole budget.
    Source: Karnin, Koren and Somekh 2013.
    """
    assert num_candidates >= 1
    num_rounds = max(1, math.ceil(math.log2(num_candidates)))
    if budget < num_candidates * num_rounds:
        raise NpoError(
            f"scoring.budget is {budget}, but {num_candidates} candidates in {num_rounds} rounds need "
            f"at least {num_candidates * num_rounds} (candidate, prompt) pairs",
            f"set scoring.budget={num_candidates * num_rounds} or more (useful: {20 * num_candidates * num_rounds}), "
            "or scoring.budget=null for all prompts and candidates",
        )
    rounds = []
    for _ in range(num_rounds):
        rounds.append(
            HalvingRound(num_candidates=num_candidates, prompts_per_candidate=budget // (num_candidates * num_rounds))
        )
        num_candidates = math.ceil(num_candidates / 2)
    return rounds


def select_survivors(scores: Sequence[CandidateScore], keep: int) -> list[str]:
    """The `keep` candidates of largest S (of several with S = 0, of largest Q_net), nearest first; of equals the nearer
    stays. All, if keep is more."""
    ranked = sorted(scores, key=lambda one: (-(one.signal or 0.0), -one.quality_net, one.distance or 0))
    return [score.candidate for score in sorted(ranked[:keep], key=lambda score: score.distance or 0)]
