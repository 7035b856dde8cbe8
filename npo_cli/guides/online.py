"""The extrapolated policy as a guide inside the training loop (`guide.source=extrapolated`), sampled online.

Only groups whose on-policy accuracy is at most guide.inject.max_accuracy get guide rollouts. Their number and use is
extrapolation.mode:

    inject: samples_per_group extra samples per such group; verified-correct ones take its last slots
    sample: the last `slots` rollouts of such a group are sampled from the extrapolated policy, correct or not

The older copy is a checkpoint of the run. There is no online guide before the run is k steps old, nor while a guide
cache is active.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from npo_cli.guides.sources.extrapolated import (
    ExtrapolatedSampler,
    Extrapolation,
    find_older_checkpoint,
    load_older_policy,
    open_extrapolated_sampler,
)
from npo_cli.policy.model import Policy
from npo_cli.rollout.batch import PromptBatch, StepBatch
from npo_cli.rollout.mixing import MixStrategy
from npo_cli.session.session import Session, count_generated_tokens, sample_groups
from npo_cli.storage.checkpoints import Checkpoint
from npo_cli.types.rollouts import Group, Prompt, Rollout

SEED_LABEL = "ahead"
"""First part of the seed label of extrapolated samples; the rest is that of on-policy samples."""


@dataclass(kw_only=True, slots=True)
class OnlineExtrapolation:
    """Finds the older checkpoint of each step, and keeps it loaded while it stays the same."""

    session: Session
    branch: str
    _loaded: Checkpoint | None = None
    _older_policy: Policy | None = field(default=None, repr=False)
    """The second model; logits only."""

    def at_step(self, step: int) -> "ExtrapolatedGuide | None":
        """The guide for the step after `step`, whose weights the session holds; None where there is none yet."""
        sampler = self.open_sampler(step)
        return None if sampler is None else ExtrapolatedGuide(session=self.session, sampler=sampler)

    def open_sampler(self, step: int) -> ExtrapolatedSampler | None:
        """The extrapolated policy of `step`; None before step k."""
        session, settings = self.session, self.session.recipe.extrapolation
        every = session.recipe.train.save_every
        older = find_older_checkpoint(session.run, self.branch, k=settings.k, step=step, every=every)
        if older is None:
            return None
        used = Extrapolation(space=settings.space, k=settings.k, a=settings.a, step=step, older_checkpoint=older)
        if older != self._loaded:
            self._older_policy = load_older_policy(self.session, used, into=self._older_policy)
            self._loaded = older
        return open_extrapolated_sampler(self.session, used, older=self._older_policy)


def open_online_guide(session: Session, branch: str) -> OnlineExtrapolation | None:
    """The online guide of a branch, if its recipe has one."""
    is_online = session.recipe.guide.source == "extrapolated"
    return OnlineExtrapolation(session=session, branch=branch) if is_online else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolatedGuide:
    """The extrapolated policy at one training step; an OnlineGuide."""

    session: Session
    sampler: ExtrapolatedSampler

    def build_groups(
        self, part: PromptBatch, before: Sequence[Group], /, *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """On-policy groups, and the same groups with guide rollouts; read from the log where `before` holds them."""
        if before:
            on_policy = [group.on_policy for group in before]
            responses = [extrapolated_rollouts(group) for group in before]
        else:
            on_policy, responses = self._sample(part, label=(seed_name, step, *part.seed_label), step=step)
        mode, num_gate_rollouts = self.session.recipe.extrapolation.mode, self._num_gate_rollouts(part)
        return on_policy, [
            inject_responses(group, extra, part.strategy, num_gate_rollouts=num_gate_rollouts, mode=mode)
            for group, extra in zip(on_policy, responses, strict=True)
        ]

    def metrics(self, batch: StepBatch) -> dict[str, float]:
        """Number and success of its samples at this step, and every token and forward pass of sampling."""
        sampled, used = extrapolation_metrics(batch.mixed), self.sampler.extrapolation
        own, extra = count_generated_tokens(batch.on_policy), sampled["extrapolate/tokens"]
        return sampled | {
            "extrapolate/k": float(used.k),
            "extrapolate/a": used.a,
            "extrapolate/lag": float(used.lag),
            "extrapolate/strength": used.strength,
            "tokens": own + extra,
            "forwards": own + used.forwards_per_token * extra,
        }

    def _num_gate_rollouts(self, part: PromptBatch) -> int:
        """On-policy rollouts whose accuracy decides whether a group gets guide rollouts."""
        settings = self.session.recipe.extrapolation
        return part.strategy.group_size - (settings.slots if settings.mode == "sample" else 0)

    def _sample(
        self, part: PromptBatch, *, label: tuple[str | int, ...], step: int
    ) -> tuple[list[Group], list[tuple[Rollout, ...]]]:
        """On-policy rollouts first; then guide rollouts for failed groups, and for the others the remaining slots."""
        settings, strategy = self.session.recipe.extrapolation, part.strategy
        num_first = self._num_gate_rollouts(part)
        groups = self._sample_on_policy(part.prompts, label=label, slots=range(num_first), step=step)
        failed = [group.prompt for group in select_failed_groups(list(groups.values()), strategy)]
        failed_ids = {prompt.prompt_id for prompt in failed}
        remaining = range(num_first, strategy.group_size)
        solved = [prompt for prompt in part.prompts if prompt.prompt_id not in failed_ids]
        if remaining and solved:
            more = self._sample_on_policy(solved, label=label, slots=remaining, step=step)
            for name, group in more.items():
                groups[name] = replace(groups[name], rollouts=groups[name].rollouts + group.rollouts)
        slots = remaining or range(settings.samples_per_group)
        label = (SEED_LABEL, *label)
        sampled = self.sampler.sample_groups(failed, label=label, slots=slots) if failed else []
        responses = {group.prompt.prompt_id: group.rollouts for group in sampled}
        return list(groups.values()), [responses.get(name, ()) for name in groups]

    def _sample_on_policy(
        self, prompts: Sequence[Prompt], *, label: tuple[str | int, ...], slots: range, step: int
    ) -> dict[str, Group]:
        groups = sample_groups(self.session, prompts, seed_label=label, slots=slots, sampler_step=step - 1)
        return {group.prompt.prompt_id: group for group in groups}


def select_failed_groups(groups: Sequence[Group], strategy: MixStrategy) -> list[Group]:
    """Groups whose on-policy accuracy is at most the gate, in order."""
    return [group for group in groups if strategy.is_eligible(group.accuracy)]


def inject_responses(
    group: Group,
    responses: Sequence[Rollout],
    strategy: MixStrategy,
    *,
    num_gate_rollouts: int,
    mode: Literal["inject", "sample"],
) -> Group:
    """The group with guide rollouts in its last slots, if its first `num_gate_rollouts` rollouts pass the gate.

    inject: the first verified-correct responses, at most guide.inject.slots. sample: all responses.
    """
    accuracy = replace(group, rollouts=group.rollouts[:num_gate_rollouts]).accuracy
    if not strategy.is_eligible(accuracy):
        return replace(group, injection_status="gate_closed", on_policy_accuracy=accuracy)
    if mode == "sample":
        rollouts = (*group.rollouts, *responses)
        return replace(group, rollouts=rollouts, injection_status="injected", on_policy_accuracy=accuracy)
    used = [rollout for rollout in responses if rollout.is_correct][: strategy.settings.slots]
    unused = tuple(rollout for rollout in responses if rollout not in used)
    if not used:
        return replace(group, injection_status="no_guide", on_policy_accuracy=accuracy, unused_guide_rollouts=unused)
    return replace(strategy.inject(group, used, accuracy), unused_guide_rollouts=unused)


def extrapolated_rollouts(group: Group) -> tuple[Rollout, ...]:
    """Every rollout of the extrapolated policy, used or not."""
    return tuple(each for each in (*group.rollouts, *group.unused_guide_rollouts) if each.source == "extrapolated")


def extrapolation_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Groups with extrapolated samples; number of samples, of correct ones, and of their tokens."""
    by_group = [extrapolated_rollouts(group) for group in groups]
    rollouts = [rollout for each in by_group for rollout in each]
    return {
        "extrapolate/groups": float(sum(bool(each) for each in by_group)),
        "extrapolate/answers": float(len(rollouts)),
        "extrapolate/correct": float(sum(each.is_correct for each in rollouts)),
        "extrapolate/tokens": float(sum(each.num_tokens for each in rollouts)),
    }
