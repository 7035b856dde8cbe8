"""What an update is made of: rows, the share of them that one process takes, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from npo_cli.losses.types import Divisors, LossStats
from npo_cli.policy.logprobs import TokenRow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One rollout on its way into the loss."""

    tokens: TokenRow
    behavior_logps: tuple[float, ...] | None
    """None of a foreign row whose writer nobody can ask."""
    advantage: float
    is_off_policy: bool
    """Written by another policy than the one being trained."""
    is_unclipped: bool = False
    """Not clipped."""

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return len(self.tokens.response_ids)


SampleWithOldLogps = tuple[TrainingSample, Tensor | None]
"""A row, and its log-probabilities at the start of the step where they are no longer the current ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShard:
    """What one process does of an update: all of it, where it is the only one."""

    off_policy: Sequence[SampleWithOldLogps]
    on_policy: Sequence[SampleWithOldLogps]
    divisors: Divisors
    """Of the whole update."""
    lr: float
    has_off_policy: bool
    """In the whole update."""
    num_passes: tuple[int, int]
    """Forward and backward passes over foreign and own rows: as many as any process needs, the last ones over
    nothing. Weights in shards are gathered in step."""
    num_shards: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardReport:
    """What came of one share; the gradient's figures are those of the whole update."""

    loss: float
    stats: LossStats
    grad_norm: float
    grad_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """Sums and means over the updates of one step."""

    loss: float
    grad_norm: float
    """Before clipping, mean over updates."""
    grad_share: float | None
    """Foreign rows' part: |g_f| / (|g_f| + |g_own|), mean over updates that had foreign rows."""
    stats: LossStats
    num_skipped: int
    """Updates left out because their gradient was not finite, or above train.skip_grad_norm."""
    num_rows: int
    """Rows that cost a backward pass."""
