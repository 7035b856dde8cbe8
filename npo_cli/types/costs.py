"""What training cost: records of curves, crossings and accounts. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """Held-out accuracy of one method at one logical step, with everything it had cost by then."""

    name: str
    step: int
    """Logical step: the position in the data order."""
    total_steps: int
    """Optimiser steps ever made for this method, scout and rolled-back ones included."""
    total_tokens: int
    """Tokens generated for it: training, training of the guide and guide sampling; without held-out evaluation."""
    accuracy: float
    total_seconds: float = 0.0
    """Wall clock of its training steps, guide sampling, scoring and probes."""
    entropy: float | None = None
    total_forwards: int = 0
    """Forward passes of sampling: one a token, and one more where an older copy reads it too. Prefills, and passes that
    score or train on whole responses, are in no count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostToThreshold:
    """What one method had spent when its held-out accuracy (mean of 3 evaluations) first reached a threshold."""

    name: str
    threshold: float
    step: int | None
    """None where the threshold was never reached (censored)."""
    total_steps: int | None
    total_tokens: int | None
    total_seconds: float | None = None
    total_forwards: int | None = None
    """As in `CurvePoint`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivityCost:
    """What one kind of work took in a whole run."""

    activity: str
    steps: int | None
    """Steps trained; None where the work is no training."""
    tokens: int
    """Generated."""
    seconds: float | None
    """Wall clock; None where it was not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCosts:
    """Everything that a run executed, seen from one branch (algorithms, section 12)."""

    branch: str
    step: int
    """Logical step: the position in the data order."""
    updates: int
    """Optimiser updates executed in the whole run, abandoned branches included."""
    training_tokens: int
    """Generated for the steps on the branch's line of descent."""
    probe_tokens: int
    guide_tokens: int
    acceptance_test_tokens: int
    """Of the held-out tests that decided which branch continues (autonpo.replay.acceptance_test)."""
    abandoned_tokens: int
    """Generated for steps that are not on that line."""
    seconds: float
    """Wall clock of all steps, probes, scorings, guide sampling and acceptance tests; without evaluations."""
    num_interventions: int
    num_rejections: int
    """Triggers that led to no replay that was kept: rejected, unguided, something missing, or taken back."""

    @property
    def tokens(self) -> int:
        """All of them."""
        sampling = self.probe_tokens + self.guide_tokens + self.acceptance_test_tokens
        return self.training_tokens + sampling + self.abandoned_tokens
