"""What a run recorded of the steps between two checkpoints: how many groups were hard, and what they yielded."""

from dataclasses import dataclass, field

from npo_cli.config.guides import GuideSettings
from npo_cli.scoring.forecast import ReplaySegment
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry, find_owning_branch
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Group

MOST_STEPS = 12
"""Steps read per segment, evenly spaced: a long log of long responses takes minutes to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTotals:
    """Sums over recorded steps, of on-policy rollouts."""

    steps: int
    groups: int
    eligible_groups: int
    """With an on-policy accuracy at or below the gate."""
    correct_in_eligible: int
    tokens: int

    def describe_replay(
        self, guide: GuideSettings, *, num_steps: int, lost_steps: int, num_prompts: int, scoring_tokens: int
    ) -> ReplaySegment:
        """The replay of these steps with a guide, groups being as hard as recorded."""
        return ReplaySegment(
            num_steps=num_steps,
            lost_steps=lost_steps,
            num_prompts=num_prompts,
            samples_all=guide.cache.prompts == "all",
            eligible_share=self.eligible_groups / self.groups,
            eligible_per_step=self.eligible_groups / self.steps,
            correct_per_step=max(1, self.correct_in_eligible) / self.steps,
            tokens_per_step=self.tokens / self.steps,
            slots=guide.inject.slots,
            most_draws=guide.cache.samples_per_prompt,
            draws_per_round=guide.cache.draws_per_round,
            scoring_tokens=scoring_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedSteps:
    """The recorded steps on one line of descent."""

    run: RunDir
    branch: str
    _logs: dict[str, RolloutLog] = field(default_factory=dict, init=False)
    _read: dict[tuple[int, float], StepTotals | None] = field(default_factory=dict, init=False)

    def summarize(self, first: int, last: int, max_accuracy: float) -> StepTotals | None:
        """Totals of at most 12 evenly spaced steps of first < step <= last; None if none of them is recorded."""
        num = min(MOST_STEPS, last - first)
        steps = [last - round(place * (last - first) / num) for place in range(num)]
        found = [totals for step in steps if (totals := self._totals(step, max_accuracy)) is not None]
        if not found:
            return None
        names = ("steps", "groups", "eligible_groups", "correct_in_eligible", "tokens")
        return StepTotals(**{name: sum(getattr(totals, name) for totals in found) for name in names})

    def find_solved_prompts(self, first: int, last: int, max_accuracy: float) -> set[str]:
        """Prompts whose every group in the recorded steps first < step <= last had an accuracy above the gate."""
        accuracies: dict[str, list[float]] = {}
        for span in ancestry(self.run, self.branch):
            log = self._open_log(span.branch)
            for step in log.steps():
                if span.contains(step) and first < step <= last:
                    for group in log.read_step(step) or ():
                        accuracies.setdefault(group.prompt.prompt_id, []).append(_on_policy_accuracy(group))
        return {prompt_id for prompt_id, seen in accuracies.items() if min(seen) > max_accuracy}

    def _open_log(self, branch: str) -> RolloutLog:
        return self._logs.setdefault(branch, RolloutLog(self.run.rollouts_path(branch)))

    def _totals(self, step: int, max_accuracy: float) -> StepTotals | None:
        if (step, max_accuracy) not in self._read:
            groups = self._open_log(find_owning_branch(self.run, self.branch, step)).read_step(step)
            self._read[step, max_accuracy] = _add_up(groups, max_accuracy) if groups else None
        return self._read[step, max_accuracy]


def _on_policy_accuracy(group: Group) -> float:
    """`on_policy_accuracy` counts the rollouts that a guide replaced, which are not in the record."""
    return group.on_policy.accuracy if group.on_policy_accuracy is None else group.on_policy_accuracy


def _add_up(groups: tuple[Group, ...], max_accuracy: float) -> StepTotals:
    own = [(_on_policy_accuracy(group), group.on_policy) for group in groups]
    eligible = [mine for accuracy, mine in own if accuracy <= max_accuracy]
    return StepTotals(
        steps=1,
        groups=len(groups),
        eligible_groups=len(eligible),
        correct_in_eligible=sum(mine.num_correct for mine in eligible),
        tokens=sum(mine.num_tokens for _, mine in own),
    )
