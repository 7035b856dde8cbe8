"""Seat foreign trajectories in the slots of a group that the learner mostly fails.

The slots of a group are drawn alike, so replacing the last ones is replacing random ones. A mixed group is an
ordinary Group: what differs is the data of some rollouts. Rewards come from the verifier, never from here: a cached
trajectory was verified when it was cached.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from npo_cli.seeds import derive_seed
from npo_cli.types.guides import GuideRollout
from npo_cli.types.rollouts import Group, Rollout

GuidesByPrompt = Mapping[str, Sequence[GuideRollout]]
"""Cached trajectories by prompt id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InjectionPolicy:
    """Which groups are helped, and how many of their slots are given away."""

    gate: float
    """Largest share of a group's own rollouts that may be correct; 1 lets every group in."""
    slots: int
    compose: Literal["replace", "append"]
    group_size: int
    """Rollouts of a group, n, before anything is appended."""
    seed: int
    """Chooses where a prompt has more trajectories than slots."""

    @property
    def is_ungated(self) -> bool:
        """Whether every group is let in, whatever its accuracy."""
        return self.gate >= 1


def count_slots(rule: InjectionPolicy, guides: Sequence[GuideRollout]) -> int:
    """Slots that such a group gives away: no more than there are trajectories."""
    return min(rule.slots, len(guides))


def count_on_policy(rule: InjectionPolicy, guides: Sequence[GuideRollout]) -> int:
    """Rollouts to be sampled: a slot that is given away whatever they say is not sampled first."""
    return rule.group_size - (count_slots(rule, guides) if rule.is_ungated and rule.compose == "replace" else 0)


def select_on_policy(group: Group) -> tuple[Rollout, ...]:
    """The learner's own rollouts of a group; all of them where nobody else took a slot."""
    return tuple(rollout for rollout in group.rollouts if not rollout.is_off_policy)


def measure_on_policy_accuracy(group: Group) -> float:
    """Share of the learner's own rollouts that are verified correct."""
    own = select_on_policy(group)
    assert own and all(rollout.verdict is not None for rollout in own), "groups are verified before they are mixed"
    return sum(rollout.verdict == "correct" for rollout in own) / len(own)


def inject_guides(groups: Sequence[Group], guides: GuidesByPrompt, rule: InjectionPolicy) -> tuple[Group, ...]:
    """Where at most `gate` of a group's own rollouts are correct, cached responses take its last slots, or new ones.

    A group above the gate, or without a cached trajectory, is kept as it is; its `mix` says which of the two it was.
    """
    return tuple(_seated(group, guides.get(group.prompt.prompt_id, ()), rule) for group in groups)


def count_injections(groups: Sequence[Group]) -> dict[str, float]:
    """Groups of a batch by what the mix did; `eligible` is what the gate let through, seated or not.

    `slots` counts the slots given away.
    """
    outcomes = [group.injection_status for group in groups]
    seated, missing = outcomes.count("injected"), outcomes.count("no_guide")
    return {
        "inject/slots": float(sum(rollout.is_off_policy for group in groups for rollout in group.rollouts)),
        "inject/eligible": float(seated + missing),
        "inject/no_guide": float(missing),
        "inject/gate_closed": float(outcomes.count("gate_closed")),
    }


def _seated(group: Group, guides: Sequence[GuideRollout], rule: InjectionPolicy) -> Group:
    accuracy = measure_on_policy_accuracy(group)
    if accuracy > rule.gate:
        return replace(group, injection_status="gate_closed", on_policy_accuracy=accuracy)
    if not guides:
        return replace(group, injection_status="no_guide", on_policy_accuracy=accuracy)
    count = count_slots(rule, guides)
    first = rule.group_size - (count if rule.compose == "replace" else 0)
    guests = [_as_rollout(guide, first + place) for place, guide in enumerate(_chosen(guides, rule, count))]
    return replace(
        group, rollouts=(*group.rollouts[:first], *guests), injection_status="injected", on_policy_accuracy=accuracy
    )


def _chosen(guides: Sequence[GuideRollout], rule: InjectionPolicy, count: int) -> Sequence[GuideRollout]:
    if count == len(guides):
        return guides
    return random.Random(derive_seed(rule.seed, guides[0].prompt_id)).sample(guides, count)


def _as_rollout(guide: GuideRollout, slot: int) -> Rollout:
    """The cached trajectory in a slot, charged to the policy that wrote it."""
    assert guide.behavior_logps is None or len(guide.response_ids) == len(guide.behavior_logps)
    return Rollout(
        prompt_id=guide.prompt_id,
        slot=slot,
        response_ids=guide.response_ids,
        behavior_logps=guide.behavior_logps,
        text=guide.text,
        finished=guide.finished,
        sampler_step=guide.guide_step,
        source=guide.source,
        verdict=guide.verdict,
        reward=1.0 if guide.verdict == "correct" else 0.0,
    )
