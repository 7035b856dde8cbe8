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
