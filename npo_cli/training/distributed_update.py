"""One update by several processes: the rows are dealt out, the gradients add up, every process updates its shards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.optim import Optimizer

from npo_cli.config.recipe import Recipe
from npo_cli.policy.model import Policy
from npo_cli.session.partition import WorkerState, partition_by_tokens
from npo_cli.session.worker_tasks import REFERENCE
from npo_cli.training.update import Updater
from npo_cli.training.update_types import RankShard, SampleWithOldLogps, ShardReport


def open_updater(policy: Policy, optimizer: Optimizer, recipe: Recipe, *, reference: Policy | None) -> Updater:
    """Policy, optimiser and loss, in this process or in all of them."""
    if policy.shared is None:
        return Updater(policy, optimizer, recipe, reference=reference)
    whose = None if reference is None or reference.shared is None else reference.shared.name
    policy.shared.worker_group.broadcast(CreateUpdater(name=policy.shared.name, recipe=recipe, reference=whose))
    return policy.shared.worker_group.worker.updater


class DistributedUpdater(Updater):
    """Deals out shares; otherwise what a single process does."""

    def run_all_shards(self, whole: RankShard) -> list[ShardReport]:
        """The update is made; one report a process."""
        assert self.policy.shared is not None
        team = self.policy.shared.worker_group
        dealt = zip(
            self._dealt(whole.off_policy, team.world_size), self._dealt(whole.on_policy, team.world_size), strict=True
        )
        shares = [
            replace(whole, off_policy=foreign, on_policy=own, num_shards=team.world_size) for foreign, own in dealt
        ]
        passes = (
            max(self.num_passes(share.off_policy) for share in shares),
            max(self.num_passes(share.on_policy) for share in shares),
        )
        return team.scatter([UpdateShard(shard=replace(share, num_passes=passes)) for share in shares])

    def _dealt(self, pairs: Sequence[SampleWithOldLogps], size: int) -> list[list[SampleWithOldLogps]]:
        return [
            [pairs[place] for place in share]
            for share in partition_by_tokens([p[0].tokens.num_tokens for p in pairs], size)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class CreateUpdater:
    """Policy, optimiser and loss, ready for shares."""

    name: str
    recipe: Recipe
    reference: str | None
    """Name of the frozen base; with adapters it is the policy's own, without them."""
    phase = "prepare updates"

    def run(self, hand: WorkerState) -> None:
        """In place of the one before."""
        policy, reference = hand.policies[self.name], None
        if self.reference is not None:
            frozen = hand.policies[self.reference]
            reference = frozen if self.reference == REFERENCE else frozen.base_policy
        assert hand.optimizer is not None
        hand.updater = DistributedUpdater(policy, hand.optimizer, self.recipe, reference=reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateShard:
    """One process's rows, and the common update."""

    shard: RankShard
    phase = "update"

    def run(self, hand: WorkerState) -> ShardReport:
        """Forward, backward, update of this process's shards."""
        return hand.updater.run_shard(self.shard)
