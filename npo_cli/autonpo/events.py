"""What the state machine of AutoNPO is told: a step was made, or what it waited for has happened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npo_cli.types.autonpo import ProbeResult, TriggerReading


@dataclass(frozen=True, kw_only=True, slots=True)
class StepObserved:
    """A training step was made (or found on record) and read."""

    reading: TriggerReading
    has_checkpoint: bool
    """Whether the policy after this step is on the disk: it may become the guide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFinished:
    """The mistakes were asked again."""

    confirmation: ProbeResult


@dataclass(frozen=True, kw_only=True, slots=True)
class PrerequisiteMissing:
    """What the phase at hand needs is gone."""

    what: str
    """In words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolationStarted:
    """A branch was born that goes on from here, guided by the policy's own motion."""

    branch: str
    until_step: int
    """Last step of that guidance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideBuilt:
    """Guides were asked for."""

    guide: str
    """Name of the cache."""
    num_prompts: int
    """Prompts that want a guide."""
    num_found: int
    """Prompts that have one."""
    num_reused: int
    """Of those, answered by the probe already."""
    num_tokens: int
    """Generated on top of the probe's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackDone:
    """A branch was born that leaves the present one at `to_step`."""

    branch: str
    to_step: int
    until_step: int
    """Last step of its replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayJudged:
    """The replayed policy was compared with the one that was left."""

    is_worse: bool
    evidence: Mapping[str, Any]
    parent: str
    """The branch to go back to where it is worse."""


ControllerEvent = (
    StepObserved | ExtrapolationStarted | ProbeFinished | PrerequisiteMissing | GuideBuilt | RollbackDone | ReplayJudged
)
