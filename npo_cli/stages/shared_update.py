"""One update by several processes: the rows are dealt out, the gradients add up, every process updates its shards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.optim import Optimizer

from npo_cli.config import Recipe
from npo_cli.policy.model import Policy
from npo_cli.stages.shares import Hand, by_tokens
from npo_cli.stages.together import REFERENCE
from npo_cli.stages.update import Updater
from npo_cli.stages.update_records import Asked, Share, ShareReport


def open_updater(policy: Policy, optimizer: Optimizer, recipe: Recipe, *, reference: Policy | None) -> Updater:
    """Policy, optimiser and loss, in this process or in all of them."""
    if policy.shared is None:
        return Updater(policy, optimizer, recipe, reference=reference)
    whose = None if reference is None or reference.shared is None else reference.shared.name
    policy.shared.team.work_alike(NewUpdater(name=policy.shared.name, recipe=recipe, reference=whose))
    return policy.shared.team.member.updater


class SharedUpdater(Updater):
    """Deals out shares; otherwise what a single process does."""

    def all_shares(self, whole: Share) -> list[ShareReport]:
        """The update is made; one report a process."""
        assert self.policy.shared is not None
        team = self.policy.shared.team
        dealt = zip(self._dealt(whole.foreign, team.size), self._dealt(whole.own, team.size), strict=True)
        shares = [replace(whole, foreign=foreign, own=own, num_shares=team.size) for foreign, own in dealt]
        passes = (
            max(self.num_passes(share.foreign) for share in shares),
            max(self.num_passes(share.own) for share in shares),
        )
        return team.work([TakeShare(share=replace(share, num_passes=passes)) for share in shares])

    def _dealt(self, pairs: Sequence[Asked], size: int) -> list[list[Asked]]:
        return [[pairs[place] for place in share] for share in by_tokens([p[0].tokens.num_tokens for p in pairs], size)]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewUpdater:
    """Policy, optimiser and loss, ready for shares."""

    name: str
    recipe: Recipe
    reference: str | None
    """Name of the frozen base; with adapters it is the policy's own, without them."""
    phase = "prepare updates"

    def take_part(self, hand: Hand) -> None:
        """In place of the one before."""
        policy, reference = hand.policies[self.name], None
        if self.reference is not None:
            frozen = hand.policies[self.reference]
            reference = frozen if self.reference == REFERENCE else frozen.base
        assert hand.optimizer is not None
        hand.updater = SharedUpdater(policy, hand.optimizer, self.recipe, reference=reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeShare:
    """One process's rows, and the common update."""

    share: Share
    phase = "update"

    def take_part(self, hand: Hand) -> ShareReport:
        """Forward, backward, update of this process's shards."""
        return hand.updater.take_share(self.share)
