"""One batch becomes one or more optimizer updates: where policy and loss meet.

N rows (rollouts), T response tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from npo_cli.activity import Activity, report_activity
from npo_cli.config.guides import InjectSettings
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.partition import partition_by_tokens
from npo_cli.distributed.process_group import current_group
from npo_cli.guides.dense_target import StepTarget
from npo_cli.losses.importance_ratio import check_ratio_available
from npo_cli.losses.policy_loss import has_loss_terms, make_policy_loss, make_sft_loss, needs_entropies
from npo_cli.losses.types import Divisors, LossInputs, LossStats, TargetInputs
from npo_cli.policy.fsdp import to_scalar
from npo_cli.policy.logprobs import Column, TokenScores
from npo_cli.policy.model import Policy, TeacherComparison
from npo_cli.policy.optimizer import set_lr
from npo_cli.policy.packing import MicroBatch, TokenRow
from npo_cli.rollout.batch import GroupWithAdvantages
from npo_cli.session.logprob_pass import plan_policy_passes, run_logprob_pass
from npo_cli.types.rollouts import TokenSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One rollout as the update reads it."""

    tokens: TokenRow
    advantage: float
    behavior_logps: tuple[float, ...] | None
    """Per response token; None if unavailable."""
    spans: tuple[TokenSpan, ...]
    """Provenance of the response tokens."""
    clip_on_policy: bool = True
    """Whether ratios of its on-policy tokens are clipped."""
    clip_off_policy: bool = True
    old_logps_T: Tensor | None = None
    """Under the weights at the start of the step; None if these are the current weights."""
    has_target: bool = False
    """Whether a dense target applies to its tokens."""

    @property
    def is_off_policy(self) -> bool:
        """Whether another policy sampled any of its tokens."""
        return any(span.is_off_policy for span in self.spans)

    @property
    def num_tokens(self) -> int:
        """Response tokens that are trained."""
        return sum(span.end - span.start for span in self.spans if span.is_trained)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """Sums and means over the updates of one step."""

    loss: float
    grad_norm: float
    """Before clipping, mean over updates."""
    grad_norm_fraction: float | None
    """Gradient fraction of rows with off-policy tokens: |g_off| / (|g_off| + |g - g_off|), mean over updates that had
    such rows."""
    stats: LossStats
    num_skipped: int
    """Updates skipped because their gradient was not finite, or above train.skip_grad_norm."""
    num_rows: int
    """Rows that took part in a backward pass."""


def build_training_samples(
    policy: Policy,
    selected: Sequence[GroupWithAdvantages],
    inject: InjectSettings,
    *,
    target: StepTarget | None = None,
) -> list[TrainingSample]:
    """One sample per rollout, group after group. With a dense target that replaces the policy gradient advantages are
    0.

    On-policy tokens are always clipped in a batch without off-policy tokens. Raises NpoError if `inject.ratio` needs
    log-probabilities that trained off-policy tokens do not have.
    """
    rollouts = [rollout for entry in selected for rollout in entry.group.rollouts]
    for rollout in rollouts:
        for span in rollout.provenance:
            if span.is_off_policy and span.is_trained:
                guide = f"the {span.source} response to prompt {rollout.prompt_id}"
                check_ratio_available(inject.ratio, has_logprobs=span.has_logprobs, guide=guide)
    is_mixed = any(rollout.is_off_policy for rollout in rollouts)
    privileged = None if target is None else target.privileged
    samples = []
    for entry in selected:
        privileged_ids = None if privileged is None else privileged.encode(entry.group)
        is_taught = privileged_ids is not None or privileged is None or not privileged.skips_unfilled
        for rollout, advantage in zip(entry.group.rollouts, entry.advantages, strict=True):
            has_target = target is not None and is_taught and target.applies_to(rollout)
            row = policy.row(entry.group.prompt, rollout.response_ids)
            samples.append(
                TrainingSample(
                    tokens=replace(row, privileged_ids=privileged_ids) if has_target else row,
                    advantage=0.0 if target is not None and target.replaces_policy_gradient else advantage,
                    behavior_logps=rollout.behavior_logps,
                    spans=rollout.provenance,
                    clip_on_policy=inject.clip_on_policy or not is_mixed,
                    clip_off_policy=inject.clip_off_policy,
                    has_target=has_target,
                )
            )
    return samples


def build_loss_inputs(samples: Sequence[TrainingSample], *, like: Tensor) -> LossInputs:
    """The samples padded as `like` `(N, T)`, and their spans as masks per token."""
    behavior_NT, old_NT = torch.full_like(like, math.nan), None
    mask_NT, off_policy_NT, unclipped_NT = (torch.zeros_like(like, dtype=torch.bool) for _ in range(3))
    weights_NT = None
    if any(span.weight != 1 for sample in samples for span in sample.spans):
        weights_NT = torch.ones_like(like)
    if samples[0].old_logps_T is not None:
        old_NT = torch.zeros_like(like)
    for row, sample in enumerate(samples):
        for span in sample.spans:
            tokens = slice(span.start, span.end)
            mask_NT[row, tokens] = span.is_trained
            off_policy_NT[row, tokens] = span.is_off_policy
            unclipped_NT[row, tokens] = not (sample.clip_off_policy if span.is_off_policy else sample.clip_on_policy)
            if weights_NT is not None:
                weights_NT[row, tokens] = span.weight
            if span.has_logprobs and sample.behavior_logps is not None:
                behavior_NT[row, tokens] = torch.tensor(sample.behavior_logps[tokens], device=like.device)
        if old_NT is not None and sample.old_logps_T is not None:
            old_NT[row, : len(sample.old_logps_T)] = sample.old_logps_T
    return LossInputs(
        mask_NT=mask_NT,
        off_policy_NT=off_policy_NT,
        behavior_logps_NT=behavior_NT,
        advantages_N=torch.tensor([sample.advantage for sample in samples], device=like.device),
        old_logps_NT=old_NT,
        unclipped_NT=unclipped_NT,
        token_weights_NT=weights_NT,
    )


def build_target_inputs(
    target: StepTarget, inputs: LossInputs, scores: TokenScores, teacher_logps_NT: Tensor | None
) -> TargetInputs:
    """What the target adds to these rows."""
    return TargetInputs(
        coefficient=target.coefficient,
        old_logps_NT=scores.logps_NT.detach() if inputs.old_logps_NT is None else inputs.old_logps_NT,
        teacher_logps_NT=teacher_logps_NT,
        divergences_NT=scores.divergences_NT,
    )


class Updater:
    """Policy, optimizer and loss. Every rank calls `take_step` with the same samples and gets the same report."""

    def __init__(
        self, policy: Policy, optimizer: Optimizer, recipe: Recipe, *, reference: Policy | None = None
    ) -> None:
        self.policy, self.optimizer, self.recipe, self.reference = policy, optimizer, recipe, reference
        is_sft = recipe.train.objective == "sft"
        inject, mismatch = recipe.guide.inject, recipe.mismatch
        self.policy_loss = (
            make_sft_loss(recipe.loss) if is_sft else make_policy_loss(recipe.loss, inject, mismatch, recipe.target)
        )
        self.trains_zero_advantages = has_loss_terms(recipe.loss)
        self.columns: list[Column] = ["entropies"] if needs_entropies(recipe.loss) else []

    def with_entropy_coef(self, coefficient: float) -> "Updater":
        """The same with this coefficient of the entropy bonus."""
        loss = self.recipe.loss.model_copy(update={"entropy_coef": coefficient})
        recipe = self.recipe.model_copy(update={"loss": loss})
        return Updater(self.policy, self.optimizer, recipe, reference=self.reference)

    def take_step(
        self,
        samples: Sequence[TrainingSample],
        *,
        lr: float,
        target: StepTarget | None = None,
        measures_guide: bool = True,
    ) -> UpdateReport:
        """Split the samples into `train.num_updates` parts and update once with each.

        The ratio of the first part is 1: its old log-probabilities are the current ones. `target`: of the samples that
        have one. `measures_guide`: whether the guide's gradient fraction is measured, for which its rows have passes of
        their own and the gradient a copy.
        """
        size = -(-len(samples) // self.recipe.train.num_updates) if samples else 1
        samples = [*samples[:size], *self._with_old_logps(samples[size:], target)]
        reports = [
            self.update(samples[start : start + size], lr=lr, target=target, measures_guide=measures_guide)
            for start in range(0, max(1, len(samples)), size)
        ]
        fractions = [report.grad_norm_fraction for report in reports if report.grad_norm_fraction is not None]
        return UpdateReport(
            loss=sum(report.loss for report in reports) / len(reports),
            grad_norm=sum(report.grad_norm for report in reports) / len(reports),
            grad_norm_fraction=sum(fractions) / len(fractions) if fractions else None,
            stats=sum((report.stats for report in reports[1:]), start=reports[0].stats),
            num_skipped=sum(report.num_skipped for report in reports),
            num_rows=sum(report.num_rows for report in reports),
        )

    def _with_old_logps(self, samples: Sequence[TrainingSample], target: StepTarget | None) -> list[TrainingSample]:
        """The samples with log-probabilities under the current weights, where they take part in the loss."""
        places = [place for place, sample in enumerate(samples) if self._is_trained(sample, target)]
        found = list(samples)
        if self.recipe.reuses_logprobs:
            for place in places:
                logps = samples[place].behavior_logps
                if not samples[place].is_off_policy and logps is not None:
                    found[place] = replace(samples[place], old_logps_T=torch.tensor(logps, device=self.policy.device))
            places = [place for place in places if found[place].old_logps_T is None]
        if places:
            scored = run_logprob_pass(self.policy, self.recipe, [samples[place].tokens for place in places])
            for place, scores in zip(places, scored, strict=True):
                found[place] = replace(samples[place], old_logps_T=scores.logps_T)
        return found

    def _is_trained(self, sample: TrainingSample, target: StepTarget | None) -> bool:
        """Whether the sample needs a pass: it has an advantage, or the loss has terms beside the surrogate."""
        has_term = target is not None and target.adds_term and sample.has_target
        return bool(sample.advantage) or self.trains_zero_advantages or has_term

    def update(
        self,
        samples: Sequence[TrainingSample],
        *,
        lr: float,
        target: StepTarget | None = None,
        measures_guide: bool = True,
    ) -> UpdateReport:
        """One optimizer update. Samples without advantage count in the divisors; they need no pass."""
        divisors = Divisors(
            num_sequences=max(1, len(samples)),
            num_tokens=max(1, sum(sample.num_tokens for sample in samples)),
            max_tokens=self.recipe.sampling.max_new_tokens,
        )
        useful = [sample for sample in samples if self._is_trained(sample, target)]
        off_policy = [sample for sample in useful if sample.is_off_policy]
        on_policy = [sample for sample in useful if not sample.is_off_policy]
        idle = sum(sample.num_tokens for sample in samples if not sample.is_off_policy) - sum(
            sample.num_tokens for sample in on_policy
        )
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        apart, rest = (off_policy, on_policy) if measures_guide else ([], useful)
        # The teacher reads no other rows than those with a target.
        with_target = [sample for sample in rest if target is not None and sample.has_target]
        rest = [sample for sample in rest if target is None or not sample.has_target]
        apart_loss, apart_stats = self.accumulate_gradients(apart, divisors)
        off_policy_gradients = self._gradients() if apart else None
        rest_loss, rest_stats = self.accumulate_gradients(rest, divisors)
        if with_target:
            target_loss, target_stats = self.accumulate_gradients(with_target, divisors, target=target)
            rest_loss, rest_stats = rest_loss + target_loss, rest_stats + target_stats
        fraction = None if off_policy_gradients is None else self._gradient_norm_fraction(off_policy_gradients)
        with current_group().phase("update"):
            grad_norm = self._apply()
        return UpdateReport(
            loss=apart_loss + rest_loss,
            grad_norm=grad_norm,
            grad_norm_fraction=fraction,
            stats=LossStats(on_policy_tokens=idle) + apart_stats + rest_stats,
            num_skipped=0 if self._is_acceptable(grad_norm) else 1,
            num_rows=len(useful),
        )

    def accumulate_gradients(
        self, samples: Sequence[TrainingSample], divisors: Divisors, *, target: StepTarget | None = None
    ) -> tuple[float, LossStats]:
        """Forward and backward over the samples, a part per rank; loss and statistics are sums over all ranks.

        `target`: of all these samples.
        """
        group = current_group()
        sizes = [sample.tokens.num_tokens for sample in samples]
        parts = [[samples[index] for index in part] for part in partition_by_tokens(sizes, group.world_size)]
        shares = target is None or target.can_share_prompts
        plans = [
            plan_policy_passes(self.policy, self.recipe.train, [each.tokens for each in part], can_share=shares)
            for part in parts
        ]
        with group.phase("update"):
            sums = self.run_passes(
                parts[group.rank],
                divisors,
                plans[group.rank],
                num_passes=max(map(len, plans)),
                # FSDP2 takes the mean over ranks, and the divisors are those of the whole update already.
                gradient_scale=group.world_size,
                target=target,
            )
            every = group.gather(sums, phase="update")
        return sum(loss for loss, _ in every), sum((stats for _, stats in every), start=LossStats())

    def run_passes(
        self,
        samples: Sequence[TrainingSample],
        divisors: Divisors,
        plan: Sequence[MicroBatch],
        *,
        num_passes: int,
        gradient_scale: float,
        target: StepTarget | None = None,
    ) -> tuple[float, LossStats]:
        """Forward and backward, pass by pass; gradients, times `gradient_scale`, add up in the parameters.

        At least `num_passes` passes: the last ones add nothing, for ranks whose sharded weights are gathered in step.
        """
        total, stats = 0.0, LossStats()
        for number, batch in enumerate(plan):
            report_activity(Activity(name="update", done=number, total=len(plan)))
            rows = [samples[index] for index in batch.indices]
            teacher_logps_NT = self._teacher_logps(target, rows, batch.pack_sizes)
            distillation = None if target is None else target.distillation
            scores = self._score(self.policy, rows, batch.pack_sizes, columns=self.columns, distillation=distillation)
            inputs = build_loss_inputs(rows, like=scores.logps_NT)
            loss, measured = self.policy_loss(
                scores.logps_NT,
                inputs,
                divisors=divisors,
                ref_logps_NT=self._reference_logps(rows, batch.pack_sizes),
                entropies_NT=scores.entropies_NT,
                target=None if target is None else build_target_inputs(target, inputs, scores, teacher_logps_NT),
            )
            (loss if gradient_scale == 1 else loss * gradient_scale).backward()
            total, stats = total + loss.item(), stats + measured
        for _ in range(num_passes - len(plan)):
            self._run_empty_pass(target)
        return total, stats

    def _run_empty_pass(self, target: StepTarget | None) -> None:
        tokens = TokenRow(prompt_ids=(0,), response_ids=(0,))
        empty = TrainingSample(tokens=tokens, advantage=0.0, behavior_logps=None, spans=())
        self._reference_logps([empty], [1])
        self._teacher_logps(target, [empty], [1])
        distillation = None if target is None else target.distillation
        (self._score(self.policy, [empty], [1], distillation=distillation).logps_NT.sum() * 0.0).backward()

    def _score(
        self,
        policy: Policy,
        samples: Sequence[TrainingSample],
        pack_sizes: Sequence[int],
        *,
        columns: Sequence[Column] = (),
        distillation: TeacherComparison | None = None,
    ) -> TokenScores:
        return policy.score(
            [sample.tokens for sample in samples],
            temperature=self.recipe.sampling.temperature,
            chunk_tokens=self.recipe.train.logit_chunk_tokens,
            columns=columns,
            pack_sizes=pack_sizes,
            distillation=distillation,
        )

    @torch.no_grad()
    def _teacher_logps(
        self, target: StepTarget | None, samples: Sequence[TrainingSample], pack_sizes: Sequence[int]
    ) -> Tensor | None:
        """Of each token under the teacher, if the target reads them."""
        if target is None or not target.reads_logps:
            return None
        temperature = target.settings.temperature
        return target.teacher.score(
            [sample.tokens.as_teacher_reads for sample in samples],
            temperature=self.recipe.sampling.temperature if temperature is None else temperature,
            chunk_tokens=self.recipe.train.logit_chunk_tokens,
            pack_sizes=pack_sizes,
        ).logps_NT.to(self.policy.device)

    @torch.no_grad()
    def _reference_logps(self, samples: Sequence[TrainingSample], pack_sizes: Sequence[int]) -> Tensor | None:
        return None if self.reference is None else self._score(self.reference, samples, pack_sizes).logps_NT

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self._with_gradient()]

    def _with_gradient(self) -> list[Tensor]:
        return [parameter for parameter in self.policy.model.parameters() if parameter.grad is not None]

    def _gradient_norm_fraction(self, off_policy: Sequence[Tensor]) -> float:
        """|g_off| / (|g_off| + |g - g_off|), before clipping."""
        rest = [parameter.grad - part for parameter, part in zip(self._with_gradient(), off_policy, strict=True)]
        off_policy_norm, rest_norm = (to_scalar(torch.nn.utils.get_total_norm(parts)) for parts in (off_policy, rest))
        return off_policy_norm / (off_policy_norm + rest_norm) if off_policy_norm + rest_norm > 0 else 0.0

    def _apply(self) -> float:
        """Clip the gradient and step; returns its norm before clipping.

        A batch without any advantage has a gradient of zero: moments still decay. A gradient that is not finite, or
        above train.skip_grad_norm, leaves weights and moments as they were.
        """
        parameters = [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = to_scalar(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.grad_clip))
        if self._is_acceptable(norm):
            self.optimizer.step()
            self.policy.mark_weights_changed()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _is_acceptable(self, grad_norm: float) -> bool:
        limit = self.recipe.train.skip_grad_norm
        return math.isfinite(grad_norm) and (limit is None or grad_norm <= limit)
