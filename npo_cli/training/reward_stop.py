"""The end of a scout by its own training reward (`scout.stop_reward`): a function of its recorded steps alone."""

from collections import deque
from dataclasses import dataclass, field
from typing import Self

from npo_cli.config.recipe import Recipe
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import is_scout
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.rollouts import StepReport


@dataclass(kw_only=True, slots=True)
class RewardStop:
    """Mean training reward of a branch's newest own steps against a threshold; never reached without one."""

    threshold: float | None
    window: int
    """Steps that the mean is over."""
    rewards: deque[float] = field(default_factory=deque)
    """Of the newest steps, at most `window`."""
    step: int = 0
    """The newest step."""

    @classmethod
    def read(cls, run: RunDir, branch: str, recipe: Recipe, *, step: int) -> Self:
        """As after the recorded `step` of a branch, which exists."""
        rules = recipe.scout
        recorded = [row["reward"] for row in read_metrics(run, branch) if row["step"] <= step and "reward" in row]
        return cls(
            threshold=rules.stop_reward if is_scout(run, branch) else None,
            window=rules.stop_window,
            rewards=deque(recorded, maxlen=rules.stop_window),
            step=step,
        )

    @property
    def is_reached(self) -> bool:
        """Whether the window is full and its mean is at least the threshold."""
        is_full = len(self.rewards) == self.window
        return self.threshold is not None and is_full and sum(self.rewards) / self.window >= self.threshold

    def observe(self, report: StepReport) -> bool:
        """Add a step, of which fine-tuning has no reward; whether the training ends after it."""
        if "reward" in report.metrics:
            self.rewards.append(report.metrics["reward"])
        self.step = report.step
        return self.is_reached

    def describe(self) -> str:
        """One line."""
        mean = sum(self.rewards) / self.window
        return (
            f"the scout ends at step {self.step}: mean reward {mean:.3f} over {self.window} steps, "
            f"scout.stop_reward={self.threshold:g}"
        )
