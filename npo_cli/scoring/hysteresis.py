"""Hysteresis: whether the way from an accuracy to a target is shorter for a replay than for the run that it replays.

    H(a) = steps from first reaching accuracy a to the target, unguided run minus replayed branch

The scout pays the steps of the unguided run to some accuracy a, the student its own steps to a, and both have the way
from a to the target before them, so

    total cost of NPO = that of GRPO + [steps of the student to a + guides + probes] - H(a).

With H = 0 rolling back is pure loss by total cost, whatever Q, V and D. A seed that never reached the target is
censored: its way is at least what it trained after a, which bounds H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from npo_cli.types.comparison import Estimate

Bound = Literal["exact", "at least", "at most"]
"""As in `MethodHysteresis`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """Steps at which one seed first reached two accuracies, None where it never did."""

    accuracy: int | None
    target: int | None
    last: int
    """Its last evaluated step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedHysteresis:
    """H of one seed, in steps, or a bound of it."""

    steps: int
    bound: Bound = "exact"


def seed_hysteresis(unguided: Arrivals, replayed: Arrivals, *, fork_step: int) -> SeedHysteresis | None:
    """H of one seed; None where one of them never reached the accuracy, where the learner that was replayed had it
    before the replay began, and where neither reached the target."""
    if unguided.accuracy is None or replayed.accuracy is None or replayed.accuracy <= fork_step:
        return None
    if unguided.target is None and replayed.target is None:
        return None
    theirs = (unguided.last if unguided.target is None else unguided.target) - unguided.accuracy
    ours = (replayed.last if replayed.target is None else replayed.target) - replayed.accuracy
    bound: Bound = "at least" if unguided.target is None else "at most" if replayed.target is None else "exact"
    return SeedHysteresis(steps=theirs - ours, bound=bound)


def estimate_hysteresis(seeds: Sequence[SeedHysteresis | None]) -> tuple[Estimate, Bound] | None:
    """Mean over the seeds with Student's interval, and what it is; None where no seed says anything.

    Seeds that are bounded on one side make the mean a bound of that side, without an interval. Where seeds are bounded
    on both sides, only exact ones enter.
    """
    known = [one for one in seeds if one is not None]
    sides = {one.bound for one in known} - {"exact"}
    if len(sides) == 2:
        known, sides = [one for one in known if one.bound == "exact"], set()
    if not known:
        return None
    from npo_cli.scoring.quality import mean_with_interval

    found = mean_with_interval([one.steps for one in known], of=len(seeds))
    if not sides:
        return found, "exact"
    return Estimate(value=found.value, num_used=found.num_used, num_total=found.num_total), sides.pop()
