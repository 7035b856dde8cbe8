"""Which candidates are worth more prompts: fixed-budget searches for the best arm.

Only counts and ranks; what is asked, and of whom, is the stage's affair. All arms of a round are asked the same
prompts, and nothing sampled in an earlier round is thrown away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.errors import NpoError
from npo_cli.types.rollouts import CheckpointScore


@dataclass(frozen=True, kw_only=True, slots=True)
class HalvingRound:
    """One round of sequential halving."""

    num_candidates: int
    """Candidates still in the race."""
    prompts_per_candidate: int
    """NEW prompts put to each of them in this round, on top of all earlier rounds' prompts."""


def halving_rounds(num_candidates: int, budget: int) -> list[HalvingRound]:
    """Sequential halving: ceil(log2 K) rounds share T (arm, prompt) pairs alike, floor(T/(|S_r| ceil(log2 K))) an arm.

    K = 8, T = 480: 8 arms x 20 new prompts, 4 x 40, 2 x 80; so the finalists saw 20 + 40 + 80 = 140. After each
    round the better half (rounded up) stays. One arm has nobody to beat: one round, the whole budget.
    Source: Karnin, Koren and Somekh 2013.
    """
    assert num_candidates >= 1
    num_rounds = max(1, math.ceil(math.log2(num_candidates)))
    if budget < num_candidates * num_rounds:
        raise NpoError(
            f"scoring.budget is {budget}, but {num_candidates} candidates in {num_rounds} rounds need "
            f"at least {num_candidates * num_rounds} (candidate, prompt) pairs",
            f"set scoring.budget to {num_candidates * num_rounds} or more (useful: {20 * num_candidates * num_rounds}), "  # noqa: E501
            "or to null to ask every candidate everything.",
        )
    rounds = []
    for _ in range(num_rounds):
        rounds.append(
            HalvingRound(num_candidates=num_candidates, prompts_per_candidate=budget // (num_candidates * num_rounds))
        )
        num_candidates = math.ceil(num_candidates / 2)
    return rounds


def select_survivors(scores: Sequence[CheckpointScore], keep: int) -> tuple[int, ...]:
    """Steps of the `keep` candidates of largest S, nearest first; of equals the nearer stays. All, if keep is more."""
    ranked = sorted(scores, key=lambda score: (-score.signal, score.distance))
    return tuple(score.step for score in sorted(ranked[:keep], key=lambda score: score.distance))
