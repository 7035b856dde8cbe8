"""Selection rules set beside the measured gain of guide candidates: rank correlation, regret, share of the best gain.

"No guide" is always a candidate, with gain 0 and price 0: a rule chooses it where no score is above the learner's own.
The best gain is a maximum of measured values and therefore biased upwards, for all rules alike.
Axes: A candidates of a learner, B bootstrap resamples (row 0 = the data as they are), L learners.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npo_cli.scoring.quality import Floats, percentile_interval, smooth_quality
from npo_cli.types.calibration import CandidateGain, RuleAtLearner, RuleKind, RuleResult

TRIVIAL_RULES = ("farthest", "Q", "Q_net")
TOLERANCE = 1e-6
"""Relative: a score that exceeds the learner's own by less equals it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A score of candidates; the candidate with the largest is chosen."""

    name: str
    kind: RuleKind
    numerator: Literal["distance", "Q", "Q_net"]
    variance: str | None = None
    """Kind of V that the score is divided by."""
    variance_exponent: float = 1.0
    per_price: bool = False
    """The score is divided by the price, at least one step."""

    def score(self, one: CandidateGain) -> float | None:
        """None where the rule does not apply: no V, or for the distance a candidate that is not on the line."""
        # Differences of rounding are no order.
        value = {"distance": one.distance, "Q": one.quality, "Q_net": round(one.quality_net, 12)}[self.numerator]
        if value is None or (self.variance is not None and self.variance not in one.variances):
            return None
        if self.variance is not None:
            value = self._smooth(value, one) * math.exp(
                -self.variance_exponent * math.log(one.variances[self.variance])
            )
        return float(f"{value / max(1.0, one.price) if self.per_price else value:.9g}")

    def score_no_guide(self, one: CandidateGain) -> float:
        """The learner's own, by any candidate of the learner: V = 1, and nothing beyond its own second try."""
        if self.numerator == "Q":
            return one.quality_self if self.variance is None else self._smooth(one.quality_self, one)
        return 0.0 if self.numerator == "Q_net" else -math.inf

    def _smooth(self, value: float, one: CandidateGain) -> float:
        return float(smooth_quality(value, one.num_failed)) if self.numerator == "Q" else value


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerGains:
    """The candidates of one learner with their gains in every resample."""

    candidates: tuple[CandidateGain, ...]
    gains_BA: Floats

    @property
    def rates_BA(self) -> Floats:
        """Gain per step of the price, which counts as at least one step."""
        return self.gains_BA / np.maximum(1.0, [one.price for one in self.candidates])


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One rule at one learner, in every resample."""

    summary: RuleAtLearner
    correlation_B: Floats
    """nan where it is undefined."""
    gain_B: Floats
    """Of the choice; 0 without a guide."""
    best_gain_B: Floats
    """Of the best candidate; at least 0, that of "no guide"."""
    rate_B: Floats
    best_rate_B: Floats


def list_rules(variance_kinds: Sequence[str], *, variance_exponent: float = 1.0) -> list[Rule]:
    """The trivial rules; Q/V, Q_net/V and Q_net/V per price for every kind of V; Q_net per price."""
    rules = [
        Rule(name="farthest", kind="trivial", numerator="distance"),
        Rule(name="Q", kind="trivial", numerator="Q"),
        Rule(name="Q_net", kind="trivial", numerator="Q_net"),
        Rule(name="Q_net/price", kind="value", numerator="Q_net", per_price=True),
    ]
    for variance in variance_kinds:
        options = {"variance": variance, "variance_exponent": variance_exponent}
        rules += [
            Rule(name=f"Q/{variance}", kind="Q/V", numerator="Q", **options),
            Rule(name=f"Q_net/{variance}", kind="Q_net/V", numerator="Q_net", **options),
            Rule(name=f"Q_net/{variance}/price", kind="value", numerator="Q_net", per_price=True, **options),
        ]
    kinds = ("trivial", "Q/V", "Q_net/V", "value")
    return sorted(rules, key=lambda rule: kinds.index(rule.kind))


def evaluate_rules(learners: Sequence[LearnerGains], rules: Sequence[Rule]) -> list[RuleResult]:
    """Every rule that applies to at least one candidate of every learner, over all learners."""
    applicable = [
        rule
        for rule in rules
        if all(any(rule.score(one) is not None for one in learner.candidates) for learner in learners)
    ]
    outcomes = {rule.name: [evaluate_at_learner(learner, rule) for learner in learners] for rule in applicable}
    trivial = {name: _regret(outcomes[name]) for name in TRIVIAL_RULES if name in outcomes}
    return [
        _summarize(rule, outcomes[rule.name], trivial, num_seeds=len(learners[0].candidates[0].gains_by_seed))
        for rule in applicable
    ]


def evaluate_at_learner(learner: LearnerGains, rule: Rule) -> Outcome:
    """Correlation, choice and regret of a rule at one learner."""
    candidates, gains_BA = learner.candidates, learner.gains_BA
    scores = [rule.score(one) for one in candidates]
    known = [a for a, score in enumerate(scores) if score is not None]
    choice = choose_candidate(scores, rule.score_no_guide(candidates[0]), prices=[one.price for one in candidates])
    zero_B = np.zeros(len(gains_BA))
    correlation_B = rank_correlations(np.array([scores[a] for a in known]), gains_BA[:, known])
    gain_B = zero_B if choice is None else gains_BA[:, choice]
    best_gain_B = np.maximum(0.0, gains_BA.max(axis=1))
    best = int(gains_BA[0].argmax())
    summary = RuleAtLearner(
        learner_step=candidates[0].learner_step,
        choice=None if choice is None else candidates[choice].candidate,
        gain=float(gain_B[0]),
        best=candidates[best].candidate if gains_BA[0, best] > 0 else None,
        best_gain=float(best_gain_B[0]),
        rank_correlation=_finite(correlation_B[0]),
        regret=float(best_gain_B[0] - gain_B[0]),
    )
    return Outcome(
        summary=summary,
        correlation_B=correlation_B,
        gain_B=gain_B,
        best_gain_B=best_gain_B,
        rate_B=zero_B if choice is None else learner.rates_BA[:, choice],
        best_rate_B=np.maximum(0.0, learner.rates_BA.max(axis=1)),
    )


def choose_candidate(scores: Sequence[float | None], no_guide: float, *, prices: Sequence[float]) -> int | None:
    """The index of the largest score, of equals the cheapest; None ("no guide") where none is above `no_guide`."""
    margin = TOLERANCE * abs(no_guide) if math.isfinite(no_guide) else 0.0
    above = [a for a, score in enumerate(scores) if score is not None and score > no_guide + margin]
    return min(above, key=lambda a: (-_known(scores[a]), prices[a]), default=None)


def _known(score: float | None) -> float:
    assert score is not None
    return score


def rank_correlations(scores_A: Floats, gains_BA: Floats) -> Floats:
    """Spearman's rank correlation of the scores with every row of gains: Pearson's of the ranks, ties by average rank.

    nan where the scores or the gains of a row are all equal, or there are fewer than two.
    """
    from scipy.stats import rankdata

    if len(scores_A) < 2:
        return np.full(len(gains_BA), np.nan)
    ranks_A, ranks_BA = rankdata(scores_A), rankdata(gains_BA.round(12), axis=1)
    ranks_A, ranks_BA = ranks_A - ranks_A.mean(), ranks_BA - ranks_BA.mean(axis=1, keepdims=True)
    scale_B = np.sqrt((ranks_A**2).sum() * (ranks_BA**2).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return np.where(scale_B > 0, ranks_BA @ ranks_A / scale_B, np.nan)


def _regret(outcomes: Sequence[Outcome]) -> Floats:
    """Mean over learners, in every resample."""
    return np.mean([one.best_gain_B - one.gain_B for one in outcomes], axis=0)


def _summarize(rule: Rule, outcomes: Sequence[Outcome], trivial: dict[str, Floats], *, num_seeds: int) -> RuleResult:
    correlations_LB = np.array([one.correlation_B for one in outcomes])
    defined_B = np.isfinite(correlations_LB).sum(axis=0)
    with np.errstate(invalid="ignore"):
        correlation_B = np.nansum(correlations_LB, axis=0) / np.where(defined_B > 0, defined_B, np.nan)
    regret_B = _regret(outcomes)
    return RuleResult(
        rule=rule.name,
        kind=rule.kind,
        num_learners=len(outcomes),
        num_seeds=num_seeds,
        **_estimate("rank_correlation", correlation_B),
        **_estimate("regret", regret_B),
        **_estimate("share", _share(outcomes, lambda one: (one.gain_B, one.best_gain_B))),
        **_estimate("share_per_cost", _share(outcomes, lambda one: (one.rate_B, one.best_rate_B))),
        regret_minus={
            name: (float((regret_B - other_B)[0]), *percentile_interval(regret_B - other_B))
            for name, other_B in trivial.items()
            if name != rule.name
        },
        learners=tuple(one.summary for one in outcomes),
    )


def _share(outcomes: Sequence[Outcome], parts: Callable[[Outcome], tuple[Floats, Floats]]) -> Floats:
    """Sum over learners of what was reached, divided by that of what could be; nan where that is 0."""
    reached_B, best_B = np.sum([parts(one) for one in outcomes], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(best_B > 0, reached_B / best_B, np.nan)


def _estimate(name: str, values_B: Floats) -> dict[str, float | None]:
    """Row 0 and a 95 % interval of the resamples in which the figure is defined."""
    value = _finite(values_B[0])
    if value is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = percentile_interval(values_B[np.isfinite(values_B)])
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
