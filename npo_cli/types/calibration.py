"""Records of a calibration: the measured gain of each guide candidate, and how well each selection rule predicts it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RuleKind = Literal["trivial", "Q/V", "Q_net/V", "value"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateGain:
    """One guide candidate of one learner: its score, its price, and what a replay with it gained.

    gain = mean held-out accuracy over the evaluations of the replay, minus that of the replay without a guide and with
    the same seed; mean over seeds, 95 % interval over seeds and held-out prompts.
    """

    branch: str
    learner_step: int
    candidate: str
    """Its SPEC."""
    distance: int | None
    """Optimizer steps ahead of the learner, negative behind it; None where it is not on the learner's line."""
    gain: float
    gain_low: float
    gain_high: float
    gains_by_seed: tuple[float, ...]
    accuracy: float
    """Mean over seeds and evaluations of the guided replays."""
    accuracy_unguided: float
    num_heldout: int
    quality: float
    quality_self: float
    quality_net: float
    num_failed: int
    """Prompts that the learner fails, on which Q was measured."""
    variances: Mapping[str, float]
    """Every kind of V; empty where log-probabilities are unavailable."""
    num_prompts: int
    """Prompts of the replay that the guide was sampled on."""
    num_solved: int
    """Of these, prompts with a guide response."""
    injected_per_step: float
    """Guide rollouts injected, mean over steps and seeds."""
    steps_thrown_away: int
    """Steps between the learner and the guide, which a rollback discards."""
    guide_tokens: int
    """Generated for the guide cache."""
    price: float
    """steps_thrown_away + guide_tokens / tokens per step of the unguided replay."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """Score of this candidate by rule; None where the rule does not apply to it."""

    @property
    def gain_per_step(self) -> float:
        """Gain per step of the price, which counts as at least one step."""
        return self.gain / max(1.0, self.price)

    @property
    def gain_per_100_steps(self) -> float:
        """The same in readable numbers."""
        return 100 * self.gain_per_step


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleAtLearner:
    """What a rule chose for one learner, with point estimates."""

    learner_step: int
    choice: str | None
    """SPEC of the candidate; None: no guide, whose gain is 0."""
    gain: float
    best: str | None
    """SPEC of the candidate with the largest measured gain; None where no gain is above 0."""
    best_gain: float
    rank_correlation: float | None
    regret: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleResult:
    """How well a selection rule predicts the gain, mean over learners; 95 % intervals over seeds and held-out prompts.

    A figure is None where it is undefined: a correlation with fewer than two different scores, a share where nothing
    can be gained.
    """

    rule: str
    kind: RuleKind
    num_learners: int
    num_seeds: int
    rank_correlation: float | None
    """Spearman's, between score and gain over the candidates of a learner; ties by average rank."""
    rank_correlation_low: float | None
    rank_correlation_high: float | None
    regret: float
    """Largest gain minus the gain of the choice."""
    regret_low: float
    regret_high: float
    share: float | None
    """Gain of the choices divided by the largest gains."""
    share_low: float | None
    share_high: float | None
    share_per_cost: float | None
    """The same of the gain per step of the price."""
    share_per_cost_low: float | None
    share_per_cost_high: float | None
    regret_minus: Mapping[str, tuple[float, float, float]]
    """Paired difference of the regret to that of each trivial rule: value, low, high; negative: this rule is better."""
    learners: tuple[RuleAtLearner, ...]
