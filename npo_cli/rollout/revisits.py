"""Prompts of a batch that are drawn from the record of earlier groups and not from the data order.

Which they are follows from the groups on record and from seeds, so a resumed branch draws the same ones, and nothing
is added to the training state.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from npo_cli.types.rollouts import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class RevisitDraw:
    """The prompts that one step revisits."""

    prompt_ids: tuple[str, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Known before they are sampled."""


class Revisits(Protocol):
    """Draws the last prompts of a batch; constructed from the groups on record, then given those of each step."""

    label: str
    """In the sampling seeds of revisited prompts, in place of the epoch."""

    def count_to_draw(self, step: int, *, num_prompts: int) -> int:
        """Prompts of a step's batch that are to be revisited; 0 in a step without."""

    def draw(self, count: int, *, group_size: int, seed: int, exclude: Collection[str]) -> RevisitDraw:
        """At most `count` different prompts, none of `exclude`, for groups of `group_size`. Changes nothing."""

    def add_groups(self, step: int, on_policy: Sequence[Group], draw: RevisitDraw | None) -> dict[str, float]:
        """The groups of the next step, before injection, in the order of the batch; returns metrics of the step.

        `draw` None: the step revisits none.
        """

    def describe(self) -> str:
        """One line for the start of training."""
