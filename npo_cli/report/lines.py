"""Records that exist only to be shown: one line of `npo show`, `npo recipes`, `npo doctor` or `npo bench`."""

from collections.abc import Mapping
from dataclasses import dataclass

from npo_cli.records import Group, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLine:
    """A group, and where it was trained on."""

    branch: str
    step: int
    group: Group


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLine:
    """A rollout, and where it was trained on."""

    branch: str
    step: int
    question: str
    """The prompt as text; chat turns as `role: content`."""
    answer: str
    rollout: Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptStory:
    """One prompt through training, along the line of descent of a branch."""

    prompt_id: str
    branch: str
    question: str
    """The prompt as text; chat turns as `role: content`."""
    answer: str
    num_visits: int
    solved_at: int | None
    """First step at which one of the policy's own rollouts was correct; None if there is none."""
    mostly_solved_at: int | None
    """First step at which more than half of them were."""
    seated_at: tuple[int, ...]
    """Steps at which a guide took a slot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """One step of that story."""

    branch: str
    step: int
    num_asked: int
    """Own rollouts."""
    num_correct: int
    """How many of those were verified correct."""
    group: Group
    """As recorded: the own rollouts, and behind them those of others, with the number of the slot that each took."""

    @property
    def guests(self) -> tuple[Rollout, ...]:
        """Rollouts of others: a guide, a teacher, the past."""
        return tuple(one for one in self.group.rollouts if one.foreign)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeLine:
    """A shipped recipe."""

    name: str
    description: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing `npo doctor` looked at."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    """What to do about it."""
    needed: bool = True
    """False for an optional part: its absence is no fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """The setting that a method gets, and what the tuning seeds said of each."""

    method: str
    setting: str
    areas: Mapping[str, float]
    """Setting to the mean over tuning seeds of held-out accuracy, averaged over the steps."""
