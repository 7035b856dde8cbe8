"""Which push the next stretch of training gets: the largest S that does not break, and none that shows nothing.

Every push of a grid and the learner itself (the control: is it the motion, or only more samples?) answer the same few
failed prompts afresh. Knows figures, no model and no file. P prompts.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from npo_cli.scoring.quality import PromptPassCount, pass_at_k
from npo_cli.types.guides import ExtrapolationSpec, ExtrapolationState


@dataclass(frozen=True, kw_only=True, slots=True)
class PushTrial:
    """One push on the prompts of a refresh."""

    push: ExtrapolationSpec
    quality_net: float
    """Q minus that of the learner's own fresh samples, on the same prompts."""
    quality_net_low: float
    """Its lower end, one-sided."""
    signal: float
    kl_per_sequence: float
    """KL(push || learner) in nats."""


def lower_net(
    ahead: Sequence[PromptPassCount], itself: Sequence[PromptPassCount], *, k: int, confidence: float
) -> tuple[float, float]:
    """Mean paired difference of pass@k over prompts, and its one-sided lower end: mean - z sd / sqrt(P).

    Without any spread the end is the mean: where neither solves anything, 0, which is no help.
    """
    other = {outcome.prompt_id: _pass(outcome, k) for outcome in itself}
    differences_P = [_pass(outcome, k) - other[outcome.prompt_id] for outcome in ahead]
    mean = statistics.fmean(differences_P)
    spread = statistics.stdev(differences_P) if len(differences_P) > 1 else 0.0
    z = statistics.NormalDist().inv_cdf(confidence)
    return mean, mean - z * spread / math.sqrt(len(differences_P))


def _pass(outcome: PromptPassCount, k: int) -> float:
    return pass_at_k(outcome.num_samples, outcome.num_correct, k)


def best_of(trials: Sequence[PushTrial], *, max_kl: float) -> PushTrial | None:
    """The largest S of those that are not broken; None where all are."""
    whole = [trial for trial in trials if trial.kl_per_sequence <= max_kl]
    return max(whole, key=lambda trial: trial.signal, default=None)


def choice_of(best: PushTrial | None, *, standing: ExtrapolationSpec) -> ExtrapolationState:
    """The best push, asked if it helps; where there is none the one that stands, and nobody is asked."""
    if best is None:
        return ExtrapolationState(spec=standing, is_active=False)
    return ExtrapolationState(spec=best.push, is_active=best.quality_net_low > 0)


def row_of(trial: PushTrial) -> dict[str, object]:
    """As it is told in an event."""
    return {**asdict(trial), "push": trial.push.name}
