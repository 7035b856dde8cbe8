"""Seat a guide in one slot of a group that the learner mostly fails.

The slots of a group are drawn alike, so replacing the last is replacing a random one. A mixed group is an
ordinary Group: what differs is the data of one rollout. Rewards come from the verifier, never from here: a cached
trajectory was verified when it was cached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from npo_cli.records import Group, GuideTrajectory, Rollout


def own_rollouts(group: Group) -> tuple[Rollout, ...]:
    """The learner's own rollouts of a group; all of them where no guide took a slot."""
    return tuple(rollout for rollout in group.rollouts if rollout.source == "own")


def seat_guides(groups: Sequence[Group], guides: Mapping[str, GuideTrajectory], *, gate: float) -> tuple[Group, ...]:
    """Where at most `gate` of a group's own rollouts are correct, a cached correct response takes its last slot.

    `guides` is keyed by prompt id. A group above the gate, or without a cached trajectory, is kept as it is, and
    its `mix` says which of the two it was.
    """
    return tuple(_seated(group, guides.get(group.prompt.prompt_id), gate) for group in groups)


def mix_counts(groups: Sequence[Group]) -> dict[str, float]:
    """Groups of a batch by what the mix did; `eligible` is what the gate let through, seated or not."""
    outcomes = [group.mix for group in groups]
    seated, missing = outcomes.count("injected"), outcomes.count("no_guide")
    return {
        "inject/slots": float(seated),
        "inject/eligible": float(seated + missing),
        "inject/no_guide": float(missing),
        "inject/gate_closed": float(outcomes.count("gate_closed")),
    }


def _seated(group: Group, guide: GuideTrajectory | None, gate: float) -> Group:
    own_accuracy = _own_accuracy(group)
    if own_accuracy > gate:
        return replace(group, mix="gate_closed", own_accuracy=own_accuracy)
    if guide is None:
        return replace(group, mix="no_guide", own_accuracy=own_accuracy)
    *kept, last = group.rollouts
    rollouts = (*kept, _as_rollout(guide, last.slot))
    return replace(group, rollouts=rollouts, mix="injected", own_accuracy=own_accuracy)


def _own_accuracy(group: Group) -> float:
    own = own_rollouts(group)
    assert own and all(rollout.verdict is not None for rollout in own), "groups are verified before they are mixed"
    return sum(rollout.verdict == "correct" for rollout in own) / len(own)


def _as_rollout(guide: GuideTrajectory, slot: int) -> Rollout:
    """The cached trajectory in a slot, charged to the guide that wrote it."""
    assert guide.verdict == "correct", "only verified-correct trajectories are cached"
    assert len(guide.response_ids) == len(guide.behavior_logps)
    return Rollout(
        prompt_id=guide.prompt_id,
        slot=slot,
        response_ids=guide.response_ids,
        behavior_logps=guide.behavior_logps,
        text=guide.text,
        finished=True,
        sampler_step=guide.guide_step,
        source="guide",
        verdict="correct",
        reward=1.0,
    )
