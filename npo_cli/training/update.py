"""One batch becomes one or more optimiser updates: the only place where policy and objective meet."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from npo_cli.config.guides import InjectSettings
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.partition import partition_by_tokens
from npo_cli.distributed.process_group import current_group
from npo_cli.losses.policy_loss import make_policy_loss
from npo_cli.losses.types import Divisors, LossInputs, LossKnobs, LossStats, MismatchKnobs
from npo_cli.policy.fsdp import to_scalar
from npo_cli.policy.logprobs import TokenRow, TokenScores, micro_batches
from npo_cli.policy.model import Policy
from npo_cli.policy.optimizer import set_lr
from npo_cli.rollout.batch import GroupWithAdvantages
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.training.update_types import RankShard, SampleWithOldLogps, ShardReport, TrainingSample, UpdateReport


def build_training_samples(
    policy: Policy, chosen: Sequence[GroupWithAdvantages], inject: InjectSettings
) -> list[TrainingSample]:
    """One row a rollout, group after group; `inject` says who is clipped in a batch with foreign rows."""
    mixed = any(rollout.is_off_policy for entry in chosen for rollout in entry.group.rollouts)
    clips = {True: inject.clip_off_policy, False: inject.clip_on_policy or not mixed}
    return [
        TrainingSample(
            tokens=policy.row(entry.group.prompt, rollout.response_ids),
            behavior_logps=rollout.behavior_logps,
            advantage=advantage,
            is_off_policy=rollout.is_off_policy,
            is_unclipped=not clips[rollout.is_off_policy],
        )
        for entry in chosen
        for rollout, advantage in zip(entry.group.rollouts, entry.advantages, strict=True)
    ]


def loss_knobs(recipe: Recipe) -> LossKnobs:
    """The recipe's loss, injection and mismatch settings, as the objective knows them."""
    loss, inject, mismatch = recipe.loss, recipe.guide.inject, recipe.mismatch
    return LossKnobs(
        kind=loss.kind,
        aggregation=loss.aggregation,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        delta=loss.delta,
        cispo_cap=loss.cispo_cap,
        kl_coef=loss.kl_coef,
        entropy_coef=loss.entropy_coef,
        ratio=inject.ratio,
        decoupled_cap=inject.decoupled_cap,
        shape=inject.ratio_shaping,
        gamma=inject.shaping_gamma,
        mismatch=MismatchKnobs(
            mode=mismatch.mode,
            cap=mismatch.cap,
            low=mismatch.low,
            high=mismatch.high,
            geo_low=mismatch.geo_low,
            geo_high=mismatch.geo_high,
            k3_max=mismatch.k3_max,
        ),
    )


class Updater:
    """Policy, optimiser and loss, ready to take steps."""

    def __init__(
        self, policy: Policy, optimizer: Optimizer, recipe: Recipe, *, reference: Policy | None = None
    ) -> None:
        self.policy, self.optimizer, self.recipe, self.reference = policy, optimizer, recipe, reference
        self.loss = make_policy_loss(loss_knobs(recipe))
        self.needs_every_row = recipe.loss.kl_coef > 0 or recipe.loss.entropy_coef > 0

    def take_step(self, rows: Sequence[TrainingSample], *, lr: float) -> UpdateReport:
        """Split the rows into `train.num_updates` parts and update once with each."""
        count = self.recipe.train.num_updates
        old_logps: list[Tensor | None] = [None] * len(rows)
        if count > 1:
            before = run_logprob_pass(self.policy, self.recipe, [row.tokens for row in rows])
            old_logps = [scores.logps_T for scores in before]
        size = -(-len(rows) // count) if rows else 1
        reports = [
            self._update(rows[start : start + size], old_logps[start : start + size], lr=lr)
            for start in range(0, max(1, len(rows)), size)
        ]
        shares = [report.grad_share for report in reports if report.grad_share is not None]
        return UpdateReport(
            loss=sum(report.loss for report in reports) / len(reports),
            grad_norm=sum(report.grad_norm for report in reports) / len(reports),
            grad_share=sum(shares) / len(shares) if shares else None,
            stats=sum((report.stats for report in reports[1:]), start=reports[0].stats),
            num_skipped=sum(report.num_skipped for report in reports),
            num_rows=sum(report.num_rows for report in reports),
        )

    def _score(self, policy: Policy, rows: Sequence[TrainingSample]) -> TokenScores:
        return policy.score(
            [row.tokens for row in rows],
            temperature=self.recipe.sampling.temperature,
            chunk_tokens=self.recipe.train.logit_chunk_tokens,
        )

    def _update(self, rows: Sequence[TrainingSample], old_logps: Sequence[Tensor | None], *, lr: float) -> UpdateReport:
        useful = [pair for pair in zip(rows, old_logps, strict=True) if pair[0].advantage or self.needs_every_row]
        idle = sum(row.num_tokens for row in rows if not (row.advantage or self.needs_every_row or row.is_off_policy))
        foreign = [pair for pair in useful if pair[0].is_off_policy]
        own = [pair for pair in useful if not pair[0].is_off_policy]
        group, parts = current_group(), [self._deal(foreign), self._deal(own)]
        shard = RankShard(
            off_policy=parts[0][group.rank],
            on_policy=parts[1][group.rank],
            divisors=Divisors(
                num_sequences=max(1, len(rows)),
                num_tokens=max(1, sum(row.num_tokens for row in rows)),
                max_tokens=self.recipe.sampling.max_new_tokens,
            ),
            lr=lr,
            has_off_policy=bool(foreign),
            num_passes=(max(map(self.num_passes, parts[0])), max(map(self.num_passes, parts[1]))),
            num_shards=group.world_size,
        )
        with group.phase("update"):
            reports = group.gather(self.run_shard(shard), phase="update")
        return UpdateReport(
            loss=sum(report.loss for report in reports),
            grad_norm=reports[0].grad_norm,
            grad_share=reports[0].grad_share,
            stats=sum((report.stats for report in reports), start=LossStats(on_policy_tokens=idle)),
            num_skipped=0 if self._bearable(reports[0].grad_norm) else 1,
            num_rows=len(useful),
        )

    def _deal(self, pairs: Sequence[SampleWithOldLogps]) -> list[list[SampleWithOldLogps]]:
        """The rows of each rank, with about as many tokens."""
        sizes = [row.tokens.num_tokens for row, _ in pairs]
        return [[pairs[index] for index in part] for part in partition_by_tokens(sizes, current_group().world_size)]

    def num_passes(self, pairs: Sequence[SampleWithOldLogps]) -> int:
        """Micro-batches of these rows."""
        return len(micro_batches([row.tokens for row, _ in pairs], max_tokens=self.recipe.train.micro_batch_tokens))

    def run_shard(self, share: RankShard) -> ShardReport:
        """Foreign rows first, so that their part of the gradient can be told from the rest."""
        set_lr(self.optimizer, share.lr)
        self.optimizer.zero_grad(set_to_none=True)
        foreign_loss, foreign_stats = self._accumulate(share.off_policy, share, num_passes=share.num_passes[0])
        foreign_gradients = self._gradients() if share.has_off_policy else None
        own_loss, own_stats = self._accumulate(share.on_policy, share, num_passes=share.num_passes[1])
        grad_share = None if foreign_gradients is None else self._share(foreign_gradients)
        return ShardReport(
            loss=foreign_loss + own_loss,
            stats=foreign_stats + own_stats,
            grad_norm=self._apply(),
            grad_share=grad_share,
        )

    def _accumulate(
        self, pairs: Sequence[SampleWithOldLogps], share: RankShard, *, num_passes: int
    ) -> tuple[float, LossStats]:
        """Forward and backward over micro-batches; gradients add up in the parameters."""
        total, stats = 0.0, LossStats()
        limit = self.recipe.train.micro_batch_tokens
        for run in micro_batches([row.tokens for row, _ in pairs], max_tokens=limit):
            rows = [pairs[index][0] for index in run]
            scores = self._score(self.policy, rows)
            loss, measured = self.loss(
                scores.logps_NT,
                self._loss_rows(rows, [pairs[index][1] for index in run], like=scores.logps_NT),
                divisors=share.divisors,
                ref_logps_NT=self._reference_logps(rows),
                entropies_NT=scores.entropies_NT,
            )
            # FSDP2 takes the mean over processes, and the divisors are those of the whole update already.
            (loss * share.num_shards if share.num_shards > 1 else loss).backward()
            total, stats = total + loss.item(), stats + measured
        for _ in range(num_passes - self.num_passes(pairs)):
            self._pass_over_nothing()
        return total, stats

    def _pass_over_nothing(self) -> None:
        """Gather and reduce with the others, and add nothing."""
        nothing = TrainingSample(
            tokens=TokenRow(prompt_ids=(0,), response_ids=(0,)), behavior_logps=None, advantage=0.0, is_off_policy=False
        )
        self._reference_logps([nothing])
        (self._score(self.policy, [nothing]).logps_NT.sum() * 0.0).backward()

    def _loss_rows(
        self, rows: Sequence[TrainingSample], old_logps: Sequence[Tensor | None], *, like: Tensor
    ) -> LossInputs:
        """The objective's view of these rows, padded as `like` `(N, T)`."""
        behavior_NT, mask_NT = torch.zeros_like(like), torch.zeros_like(like, dtype=torch.bool)
        old_NT = None if old_logps[0] is None else torch.zeros_like(like)
        for index, (row, old_T) in enumerate(zip(rows, old_logps, strict=True)):
            length = row.num_tokens
            behavior_NT[index, :length] = torch.tensor(row.behavior_logps or [math.nan] * length)
            mask_NT[index, :length] = True
            if old_NT is not None and old_T is not None:
                old_NT[index, :length] = old_T
        return LossInputs(
            behavior_logps_NT=behavior_NT.detach(),
            mask_NT=mask_NT,
            advantages_N=torch.tensor([row.advantage for row in rows], device=like.device),
            off_policy_N=torch.tensor([row.is_off_policy for row in rows], device=like.device),
            old_logps_NT=old_NT,
            unclipped_N=torch.tensor([row.is_unclipped for row in rows], device=like.device),
        )

    @torch.no_grad()
    def _reference_logps(self, rows: Sequence[TrainingSample]) -> Tensor | None:
        return None if self.reference is None else self._score(self.reference, rows).logps_NT

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self._with_gradient()]

    def _with_gradient(self) -> list[Tensor]:
        return [parameter for parameter in self.policy.model.parameters() if parameter.grad is not None]

    def _share(self, foreign: Sequence[Tensor]) -> float:
        """|g_f| / (|g_f| + |g - g_f|), before clipping."""
        rest = [parameter.grad - part for parameter, part in zip(self._with_gradient(), foreign, strict=True)]
        foreign_norm, rest_norm = (to_scalar(torch.nn.utils.get_total_norm(parts)) for parts in (foreign, rest))
        return foreign_norm / (foreign_norm + rest_norm) if foreign_norm + rest_norm > 0 else 0.0

    def _apply(self) -> float:
        """Clip and update. A batch without any advantage has a gradient of zero: moments still decay.

        A gradient that is not finite, or above train.skip_grad_norm, leaves weights and moments as they were.
        """
        parameters = [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = to_scalar(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.grad_clip))
        if self._bearable(norm):
            self.optimizer.step()
            self.policy.mark_weights_changed()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _bearable(self, grad_norm: float) -> bool:
        limit = self.recipe.train.skip_grad_norm
        return math.isfinite(grad_norm) and (limit is None or grad_norm <= limit)
