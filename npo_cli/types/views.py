"""Records that exist only to be shown: one line of `npo show`, `npo recipes`, `npo doctor` or `npo bench`.

Branches as pictures need them: where each one left its parent, who guided it, how far it came.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from npo_cli.types.rollouts import Group, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Conclusion:
    """The end of a command: its result in one sentence, and the command that comes next."""

    sentence: str
    next: str | None = None
    """None where nothing comes next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovedFolder:
    """A folder that `npo rm` deletes, or would delete."""

    path: str
    """Relative to the run directory."""
    kind: str
    """`branch`, `guide cache`, `scoring`, `probe` or `calibration`."""
    branch: str
    size_bytes: int
    is_deleted: bool


RunState = Literal["running", "stopped", "finished", "damaged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunListing:
    """One run of `npo ls`."""

    run: str
    recipe: str
    """Name of the recipe that it was created with."""
    branches: tuple[str, ...]
    step: int
    """The farthest step that any branch has saved."""
    num_steps: int
    """train.num_steps of that branch."""
    best_accuracy: float | None
    """Highest held-out accuracy; None without an evaluation."""
    best_branch: str | None
    best_step: int | None
    size_bytes: int
    state: RunState
    """running: a process holds the run; stopped: a branch was interrupted; damaged: it cannot be read."""
    note: str = ""
    """The process that holds it, the interrupted branches, or what is damaged."""
    scouts: tuple[str, ...] = ()
    """Its disposable scouts, which are not among the branches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """A group, and where it was trained on."""

    branch: str
    step: int
    group: Group


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutView:
    """A rollout, and where it was trained on."""

    branch: str
    step: int
    prompt_text: str
    """The prompt as text; chat turns as `role: content`."""
    reference_answer: str
    rollout: Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptHistory:
    """One prompt through training, along the line of descent of a branch."""

    prompt_id: str
    branch: str
    prompt_text: str
    """The prompt as text; chat turns as `role: content`."""
    reference_answer: str
    num_visits: int
    first_solved_step: int | None
    """First step at which one of the policy's own rollouts was correct; None if there is none."""
    first_mostly_solved_step: int | None
    """First step at which more than half of them were."""
    injection_steps: tuple[int, ...]
    """Steps at which a guide took a slot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptVisit:
    """One step of that story."""

    branch: str
    step: int
    num_on_policy: int
    """Own rollouts."""
    num_correct: int
    """How many of those were verified correct."""
    group: Group
    """As recorded: the own rollouts, and behind them those of others, with the number of the slot that each took."""

    @property
    def off_policy_rollouts(self) -> tuple[Rollout, ...]:
        """Rollouts of others: a guide, a teacher, the past."""
        return tuple(one for one in self.group.rollouts if one.is_off_policy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """Something in a run directory that is not as it was written."""

    message: str
    """The file, the line if known, and what is wrong."""
    restore: str
    """What can be done about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedRun:
    """What `npo verify` read."""

    run: str
    num_damages: int
    num_logs: int
    num_checkpoints: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeView:
    """A shipped recipe."""

    name: str
    description: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionView:
    """A section of the recipe."""

    section: str
    num_settings: int
    """Settings of its own, without those of its subsections."""
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingView:
    """A setting of the recipe."""

    key: str
    description: str
    type: str
    allowed: str
    default: Any
    """As JSON has it; None also where `is_required`."""
    is_required: bool
    change: str
    """When it may change within a run."""
    comparison: str
    """What a difference means between runs that are compared."""
    applies_when: str
    """Settings without which it has no effect; empty if it always has one."""
    recipes: Mapping[str, Any]
    """Shipped recipe or method with another value, and that value; empty in a list of settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorCheck:
    """One thing `npo doctor` looked at."""

    name: str
    is_ok: bool
    detail: str
    hint: str = ""
    """What to do about it."""
    is_required: bool = True
    """False for an optional part: its absence is no fault."""
    group: str = ""
    """Checks of one group that passed are shown in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedWork:
    """One part of what a command would do, as `--dry-run` prints it."""

    work: str
    """What would be done, in a few words."""
    steps: str = ""
    """Steps of training that it covers, such as `1-300`."""
    num_steps: int | None = None
    """Steps trained by several runs together."""
    prompts: int | None = None
    samples: int | None = None
    """At most so many responses would be sampled."""
    max_tokens: int | None = None
    """The same in tokens, if every response had full length."""
    recorded_tokens: int | None = None
    """Estimate of the tokens from the length of recorded responses; None without a record."""
    recorded_seconds: float | None = None
    """Estimate of the seconds from the recorded steps; None without a record."""
    num_bytes: int | None = None
    """Disk space."""


CheckedPart = Literal["recipe", "data", "verifier", "model", "engine", "packages", "prompts", "memory", "disk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectCheck:
    """One thing `npo check` looked at."""

    part: CheckedPart
    state: Literal["ok", "note", "fault"]
    """`note`: questionable, or not checked; a run may work."""
    message: str
    hint: str = ""
    """How to fix it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file or folder that a command wrote."""

    path: str
    content: str
    """What it is, in a few words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedSetting:
    """The setting that a method gets, and what the tuning seeds said of each."""

    method: str
    setting: str
    areas: Mapping[str, float]
    """Setting to the mean over tuning seeds of held-out accuracy, averaged over the tokens generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchSpan:
    """One branch of the lineage tree."""

    branch: str
    parent: str | None
    fork_step: int
    last_step: int
    """Newest step on record; `fork_step` where there is none."""
    lineage_until: int | None
    """Last of its own steps on the line of descent that the report follows; None where none is."""
    guide_cache: str | None
    guide_step: int | None
    """Step of the checkpoint that guided; None without a guide, or where its cache is gone."""
    guide_until: int | None
    """Last step at which the guide was mixed in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchCurve:
    """How a branch went, as `npo watch` draws it: (step, value) each."""

    branch: str
    num_steps: int
    """train.num_steps of its recipe."""
    rewards: tuple[tuple[int, float], ...]
    """Moving averages of the mean reward of a step."""
    entropies: tuple[tuple[int, float], ...]
    """Moving averages, in nats."""
    accuracies: tuple[tuple[int, float], ...]
    """Held-out, avg@k."""

    @property
    def last_step(self) -> int:
        """The newest recorded step; 0 before the first."""
        return self.rewards[-1][0] if self.rewards else 0
