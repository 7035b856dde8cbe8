"""Mixing guide rollouts into groups: a `MixStrategy` decides which slots, and which tokens of them, are off-policy.

The rollouts of a group are sampled alike, so replacing the last ones replaces random ones. A mixed group is an ordinary
group: what differs is the provenance of some tokens. Rewards come from the verifier, never from here: a cached
response was verified when it was cached.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from npo_cli.config.guides import InjectSettings
from npo_cli.errors import RunFailed
from npo_cli.registry import MIX_STRATEGIES
from npo_cli.seeds import derive_seed
from npo_cli.types.rollouts import Group, Rollout

GuidesByPrompt = Mapping[str, Sequence[Rollout]]
"""Cached guide rollouts by prompt id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixStrategy:
    """Injects guide rollouts into the groups whose on-policy accuracy is at most `settings.max_accuracy`.

    A subclass says in `fill_slots` where they go, and may give rollouts `spans`: tokens of a guide, tokens of the
    policy, tokens that are not trained. It is listed in `npo_cli.registry.MIX_STRATEGIES`.
    """

    name: ClassVar[str]
    """The value of `guide.inject.mode`."""
    adds_rollouts: ClassVar[bool] = False
    """Whether guide rollouts come on top of `group_size` on-policy ones, so that there may be any number of them."""

    settings: InjectSettings
    group_size: int
    """Rollouts per group, before anything is appended."""
    seed: int
    """Chooses where a prompt has more guide rollouts than slots."""

    def num_to_sample(self, num_guides: int) -> int:
        """Rollouts to sample from the policy for a group with so many guide rollouts."""
        return self.group_size

    def fill_slots(self, on_policy: Sequence[Rollout], guides: Sequence[Rollout]) -> Sequence[Rollout]:
        """The rollouts of a mixed group, given at most `settings.slots` guide rollouts; slots are numbered after."""
        raise NotImplementedError

    def is_eligible(self, accuracy: float) -> bool:
        """Whether a group of this on-policy accuracy receives guide rollouts."""
        return accuracy <= self.settings.max_accuracy

    def mix_groups(self, groups: Sequence[Group], guides: GuidesByPrompt) -> Sequence[Group]:
        """Groups sampled together, each mixed with the guide rollouts of its prompt; the order stays."""
        return [self.mix(group, guides.get(group.prompt.prompt_id, ())) for group in groups]

    def mix(self, group: Group, guides: Sequence[Rollout]) -> Group:
        """The group with guide rollouts injected, or as it was, with `injection_status` saying why."""
        accuracy = group.on_policy.accuracy
        if not self.is_eligible(accuracy):
            return replace(group, injection_status="gate_closed", on_policy_accuracy=accuracy)
        if not guides:
            return replace(group, injection_status="no_guide", on_policy_accuracy=accuracy)
        return self.inject(group, self.select(guides), accuracy)

    def inject(self, group: Group, guides: Sequence[Rollout], accuracy: float) -> Group:
        """The group with these guide rollouts in their slots."""
        rollouts = self.fill_slots(group.rollouts, guides)
        surplus = len(rollouts) - self.group_size
        if surplus < 0 or (surplus > 0 and not self.adds_rollouts):
            raise RunFailed(
                f"guide.inject.mode={self.name} filled a group with {len(rollouts)} rollouts: train.group_size is "
                f"{self.group_size}",
                "fix its fill_slots (adds_rollouts = True allows more)",
            )
        return replace(
            group,
            rollouts=tuple(replace(rollout, slot=slot) for slot, rollout in enumerate(rollouts)),
            injection_status="injected",
            on_policy_accuracy=accuracy,
        )

    def select(self, guides: Sequence[Rollout]) -> Sequence[Rollout]:
        """Of a prompt's guide rollouts as many as there are slots, drawn by the seed."""
        if len(guides) <= self.settings.slots:
            return guides
        return random.Random(derive_seed(self.seed, guides[0].prompt_id)).sample(guides, self.settings.slots)


class ReplaceLastSlots(MixStrategy):
    """Guide rollouts replace the last on-policy rollouts of the group."""

    name = "replace"

    def num_to_sample(self, num_guides: int) -> int:
        """A slot that is replaced whatever the group's accuracy is not sampled first."""
        is_gated = self.settings.max_accuracy < 1
        return self.group_size - (0 if is_gated else min(self.settings.slots, num_guides))

    def fill_slots(self, on_policy: Sequence[Rollout], guides: Sequence[Rollout]) -> Sequence[Rollout]:
        """First on-policy, then guide rollouts, `group_size` in all."""
        return (*on_policy[: self.group_size - len(guides)], *guides)


class AppendSlots(MixStrategy):
    """Guide rollouts are added to the group's on-policy rollouts."""

    name = "append"
    adds_rollouts = True

    def fill_slots(self, on_policy: Sequence[Rollout], guides: Sequence[Rollout]) -> Sequence[Rollout]:
        """All on-policy rollouts, then the guide's."""
        return (*on_policy, *guides)


class NoSlots(MixStrategy):
    """Guide rollouts take no slots: a dense target's teacher is shown them (`target.privileged=response`)."""

    name = "none"
    adds_rollouts = True

    def mix_groups(self, groups: Sequence[Group], guides: GuidesByPrompt) -> Sequence[Group]:
        """The groups as they are."""
        return groups


def make_mix_strategy(settings: InjectSettings, *, group_size: int, seed: int) -> MixStrategy:
    """The strategy that `guide.inject.mode` names."""
    strategy: type[MixStrategy] = MIX_STRATEGIES.get(settings.mode)
    return strategy(settings=settings, group_size=group_size, seed=seed)


def count_injections(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of a batch: groups by injection status, and off-policy rollouts.

    `eligible` are groups at or below the accuracy threshold, with or without a guide rollout.
    """
    statuses = [group.injection_status for group in groups]
    num_injected, num_missing = statuses.count("injected"), statuses.count("no_guide")
    return {
        "inject/slots": float(sum(rollout.is_off_policy for group in groups for rollout in group.rollouts)),
        "inject/eligible": float(num_injected + num_missing),
        "inject/no_guide": float(num_missing),
        "inject/gate_closed": float(statuses.count("gate_closed")),
    }
