"""The batch of one step: choose prompts, sample, verify, inject guide rollouts, compute advantages, select groups.

P prompts, G rollouts per prompt. A step that a killed process had already recorded is read back instead of sampled
again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.losses.advantages import group_advantages, overlong_penalty
from npo_cli.rollout.mixing import GuidesByPrompt, MixStrategy, make_mix_strategy
from npo_cli.rollout.prefix import continue_prefixes
from npo_cli.rollout.revisits import RevisitDraw, Revisits
from npo_cli.seeds import derive_seed
from npo_cli.session.session import Session, count_generated_tokens, sample_groups
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.rollouts import Group, Prompt

SampleMissing = Callable[[Sequence[Prompt]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveGuide:
    """The guide cache in use."""

    rollouts: GuidesByPrompt
    until_step: int
    """Last step of injection."""
    start_step: int = 0
    """Step before the first of injection."""
    sample_missing: SampleMissing | None = None
    """Samples prompts that a lazy cache lacks, and adds them to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts of a step that are sampled and mixed alike."""

    prompts: tuple[Prompt, ...]
    seed_label: tuple[str | int, ...]
    """Part of every sampling seed, after branch and step."""
    guides: GuidesByPrompt | None
    """Guide rollouts that may be injected; None without a guide."""
    strategy: MixStrategy


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The prompts of one step, and the position in the data order after them."""

    prompt_batches: tuple[PromptBatch, ...]
    position: int
    revisits: RevisitDraw | None = None
    """Prompts that are not from the data order; None where the step draws none."""


class OnlineGuide(Protocol):
    """Generates guide rollouts online, during batch construction."""

    def build_groups(
        self, prompt_batch: PromptBatch, recorded: Sequence[Group], /, *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """On-policy and mixed groups of these prompts, from the rollout log if `recorded` is not empty."""

    def metrics(self, batch: "StepBatch") -> dict[str, float]:
        """Metrics of the step, among them `tokens` and `forwards` of sampling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWithAdvantages:
    """A (mixed) group and the advantage of each of its rollouts."""

    group: Group
    advantages: tuple[float, ...]

    @property
    def has_signal(self) -> bool:
        """Whether any advantage is not 0."""
        return any(advantage != 0 for advantage in self.advantages)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one step sampled and what it trains on."""

    on_policy: tuple[Group, ...]
    """Every group before injection."""
    mixed: tuple[Group, ...]
    """The same groups after injection."""
    selected: tuple[GroupWithAdvantages, ...]
    """The groups trained on: all of them, or with dynamic sampling those with a non-zero advantage."""
    num_gen_batches: int
    is_recorded: bool
    """Read back from the rollout log instead of sampled."""
    position: int
    """Position in the data order after this step."""
    order_metrics: Mapping[str, float] = field(default_factory=dict)
    """Of revisited prompts; empty without."""

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that the policy generated, those after a guide's prefix included; tokens of guides are charged
        elsewhere."""
        injected = [one for group in self.mixed for one in group.rollouts if one.is_off_policy]
        return count_generated_tokens(self.on_policy) + sum(one.num_on_policy_tokens for one in injected)


def build_batch(
    session: Session,
    rollout_log: RolloutLog,
    *,
    seed_name: str,
    step: int,
    position: int,
    active_guide: ActiveGuide | None,
    batch_plan: BatchPlan | None = None,
    online_guide: OnlineGuide | None = None,
    revisits: Revisits | None = None,
) -> StepBatch:
    """Read the step's batch back from the log, or sample it with the session's weights and record it.

    `batch_plan` None: the next prompts of the data order, and of `revisits`. `online_guide` takes the place of a guide
    cache.
    """
    batch = assemble_batch(
        session,
        rollout_log.read_step(step) or (),
        seed_name=seed_name,
        step=step,
        sampler_step=step - 1,
        position=position,
        active_guide=active_guide,
        batch_plan=batch_plan,
        online_guide=online_guide,
        revisits=revisits,
    )
    record_batch(rollout_log, step, batch)
    return batch


def record_batch(rollout_log: RolloutLog, step: int, batch: StepBatch) -> None:
    """Begin to write a batch to the log, unless it was read from there."""
    if not batch.is_recorded:
        groups = [to_log_group(*pair) for pair in zip(batch.on_policy, batch.mixed, strict=True)]
        rollout_log.start_writing(step, groups)


def assemble_batch(
    session: Session,
    recorded: Sequence[Group],
    *,
    seed_name: str,
    step: int,
    sampler_step: int,
    position: int,
    active_guide: ActiveGuide | None,
    batch_plan: BatchPlan | None = None,
    online_guide: OnlineGuide | None = None,
    revisits: Revisits | None = None,
) -> StepBatch:
    """Sample once, or with dynamic sampling until enough groups have signal after injection or the limit is reached.

    `recorded` groups of the step, if there are any, are taken instead of samples of the policy of `sampler_step`. The
    groups are added to `revisits`.
    """
    recipe = session.recipe
    num_groups = recipe.train.prompts_per_step
    guides = select_cached_guides(active_guide, step)
    recorded = [restore_prompt(session, group) for group in recorded]
    is_recorded = bool(recorded)
    on_policy: list[Group] = []
    mixed: list[Group] = []
    selected: list[GroupWithAdvantages] = []
    num_gen_batches = 0
    place = {"seed_name": seed_name, "step": step}
    draw = None
    while num_gen_batches < (recipe.sampling.max_gen_batches if recipe.sampling.dynamic else 1):
        plan = batch_plan or plan_next_batch(session, **place, position=position, guides=guides, revisits=revisits)
        num_gen_batches, position, draw = num_gen_batches + 1, plan.position, plan.revisits
        pairs = []
        for part in plan.prompt_batches:
            before, recorded = recorded[: len(part.prompts)], recorded[len(part.prompts) :]
            if online_guide is None:
                guide = active_guide if guides is not None else None
                pairs.append(build_groups(session, part, before, **place, sampler_step=sampler_step, guide=guide))
            else:
                pairs.append(online_guide.build_groups(part, before, **place))
        on_policy += chain.from_iterable(sampled for sampled, _ in pairs)
        new = list(chain.from_iterable(groups for _, groups in pairs))
        mixed += new
        entries = add_advantages(session, new)
        selected += [entry for entry in entries if entry.has_signal] if recipe.sampling.dynamic else entries
        if len(selected) >= num_groups:
            break
    order_metrics = {} if revisits is None else revisits.add_groups(step, on_policy, draw)
    return StepBatch(
        on_policy=tuple(on_policy),
        mixed=tuple(mixed),
        selected=tuple(selected[:num_groups]),
        num_gen_batches=num_gen_batches,
        is_recorded=is_recorded,
        position=position,
        order_metrics=order_metrics,
    )


def build_sft_batch(session: Session, active_guide: ActiveGuide, *, position: int) -> StepBatch:
    """The guide's correct responses to the next prompts of the data order, each with advantage 1; no rollouts."""
    end = position + session.recipe.train.prompts_per_step
    prompts = [session.task.train[index] for index in session.order.indices(position, end - position)]
    if active_guide.sample_missing:
        active_guide.sample_missing(prompts)
    selected = []
    for prompt in prompts:
        known = active_guide.rollouts.get(prompt.prompt_id, ())
        rollouts = tuple(rollout for rollout in known if rollout.is_correct)
        group = Group(prompt=prompt, rollouts=rollouts)
        selected.append(GroupWithAdvantages(group=group, advantages=(1.0,) * len(rollouts)))
    return StepBatch(
        on_policy=(), mixed=(), selected=tuple(selected), num_gen_batches=0, is_recorded=False, position=end
    )


def check_sft_guide(recipe: Recipe, guide: ActiveGuide | None, *, last_step: int) -> None:
    """Refuse supervised fine-tuning without a guide cache, and beyond its last step."""
    if recipe.train.objective != "sft":
        return
    if guide is None:
        raise NpoError(
            "train.objective=sft learns the responses of a guide cache, and there is none",
            "npo sample-guide RUN --at STEP --source SPEC --name NAME, then "
            "npo resume RUN --at STEP --guide NAME train.objective=sft",
        )
    if last_step > guide.until_step:
        raise NpoError(
            f"the guide's responses are for steps up to {guide.until_step}; train.objective=sft has nothing to learn "
            f"after that, and the training would go on to step {last_step}",
            f"--until {guide.until_step}   # then fork from there: --no-guide train.objective=rl",
        )


def select_cached_guides(active_guide: ActiveGuide | None, step: int) -> GuidesByPrompt | None:
    """The cached responses that may be injected at a step; None without a guide, or after its last step."""
    return active_guide.rollouts if active_guide and step <= active_guide.until_step else None


def plan_next_batch(
    session: Session,
    *,
    seed_name: str,
    step: int,
    position: int,
    guides: GuidesByPrompt | None,
    group_size: int | None = None,
    revisits: Revisits | None = None,
) -> BatchPlan:
    """The next prompts of the data order, with `group_size` rollouts each (None: train.group_size); the last of the
    batch are the prompts that `revisits` draws.

    The data order stays where it is for them; it passes over a prompt that they hold already. Where there are too few,
    it fills the batch.
    """
    train = session.recipe.train
    strategy = open_mix_strategy(session, seed_name=seed_name, step=step, group_size=group_size)
    count = train.prompts_per_step
    num_revisits = 0 if revisits is None else revisits.count_to_draw(step, num_prompts=count)
    fresh, after = draw_from_order(session, position, count=count - num_revisits)
    draw = None
    if revisits is not None and num_revisits:
        draw = revisits.draw(
            num_revisits,
            group_size=strategy.group_size,
            seed=derive_seed(train.seed, revisits.label, seed_name, step),
            exclude={prompt.prompt_id for _, prompt in fresh},
        )
        drawn = draw.prompt_ids
        if len(drawn) < num_revisits:
            fresh, after = draw_from_order(
                session, position, count=count - len(drawn), skips=lambda prompt, _: prompt.prompt_id in drawn
            )
    batches = batches_by_epoch(fresh, guides=guides, strategy=strategy)
    if revisits is not None and draw is not None and draw.prompt_ids:
        prompts = tuple(map(session.task.prompt, draw.prompt_ids))
        batches.append(PromptBatch(prompts=prompts, seed_label=(revisits.label,), guides=guides, strategy=strategy))
    return BatchPlan(prompt_batches=tuple(batches), position=after, revisits=draw)


def draw_from_order(
    session: Session, position: int, *, count: int, skips: Callable[[Prompt, int], bool] = lambda prompt, epoch: False
) -> tuple[list[tuple[int, Prompt]], int]:
    """The next `count` prompts of the data order with their epochs, and the position after them. `skips` says of a
    prompt and its epoch whether it is passed over."""
    found: list[tuple[int, Prompt]] = []
    while len(found) < count:
        epoch, (index,) = session.order.epoch(position), session.order.indices(position, 1)
        prompt = session.task.train[index]
        position += 1
        if not skips(prompt, epoch):
            found.append((epoch, prompt))
    return found, position


def batches_by_epoch(
    drawn: Sequence[tuple[int, Prompt]], *, guides: GuidesByPrompt | None, strategy: MixStrategy
) -> list[PromptBatch]:
    """Prompts of the data order, sampled together by epoch.

    The epoch is part of the seed label, so a small pool that wraps inside a step still gets fresh samples.
    """
    prompts: dict[int, list[Prompt]] = {}
    for epoch, prompt in drawn:
        prompts.setdefault(epoch, []).append(prompt)
    return [
        PromptBatch(prompts=tuple(each), seed_label=(epoch,), guides=guides, strategy=strategy)
        for epoch, each in prompts.items()
    ]


def open_mix_strategy(session: Session, *, seed_name: str, step: int, group_size: int | None = None) -> MixStrategy:
    """The recipe's strategy, with this step's seed."""
    train = session.recipe.train
    seed = derive_seed(train.seed, "seat", seed_name, step)
    return make_mix_strategy(session.recipe.guide.inject, group_size=group_size or train.group_size, seed=seed)


def build_groups(
    session: Session,
    prompt_batch: PromptBatch,
    recorded: Sequence[Group],
    *,
    seed_name: str,
    step: int,
    sampler_step: int,
    guide: ActiveGuide | None = None,
) -> tuple[Sequence[Group], Sequence[Group]]:
    """On-policy groups, recorded or sampled, and the same groups with cached guide rollouts injected, or continued
    prefixes of these.

    `guide`: whose `sample_missing` adds to the guides those of the groups that pass the gate: where all do, before the
    policy is sampled, as the number of its rollouts may depend on them.
    """
    sample_missing = guide.sample_missing if guide else None
    if sample_missing and prompt_batch.strategy.is_eligible(1.0):
        sample_missing(prompt_batch.prompts)
    on_policy = [group.on_policy for group in recorded] or sample_on_policy_groups(
        session, prompt_batch, seed_name=seed_name, step=step, sampler_step=sampler_step
    )
    if prompt_batch.guides is None:
        return on_policy, on_policy
    if sample_missing:
        sample_missing([group.prompt for group in on_policy if prompt_batch.strategy.is_eligible(group.accuracy)])
    guides = prompt_batch.guides
    prefix = session.recipe.guide.inject.prefix
    if prefix.fraction and guide is not None:
        fraction = prefix.fraction_at(step, start_step=guide.start_step, last_step=guide.until_step)
        guides = {
            group.prompt.prompt_id: tuple(rollout for rollout in group.rollouts if rollout.is_off_policy)
            for group in recorded
        } or continue_prefixes(
            session,
            on_policy,
            guides,
            prompt_batch.strategy,
            fraction=fraction,
            seed_label=(seed_name, step, *prompt_batch.seed_label),
            sampler_step=sampler_step,
        )
    return on_policy, prompt_batch.strategy.mix_groups(on_policy, guides)


def sample_on_policy_groups(
    session: Session, prompt_batch: PromptBatch, *, seed_name: str, step: int, sampler_step: int
) -> list[Group]:
    """Sample and verify as many rollouts per prompt as the mix strategy asks for, by the policy of `sampler_step`."""
    prompts_by_count: dict[int, list[Prompt]] = {}
    for prompt in prompt_batch.prompts:
        num_guides = len((prompt_batch.guides or {}).get(prompt.prompt_id, ()))
        prompts_by_count.setdefault(prompt_batch.strategy.num_to_sample(num_guides), []).append(prompt)
    groups: dict[str, Group] = {}
    for count, prompts in prompts_by_count.items():
        label = (seed_name, step, *prompt_batch.seed_label)
        sampled = sample_groups(session, prompts, seed_label=label, slots=range(count), sampler_step=sampler_step)
        groups |= {group.prompt.prompt_id: group for group in sampled}
    return [groups[prompt.prompt_id] for prompt in prompt_batch.prompts]


def add_advantages(session: Session, groups: Sequence[Group]) -> list[GroupWithAdvantages]:
    """The advantages of each group; groups of different sizes are different tensors."""
    indices_by_size: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        indices_by_size.setdefault(len(group.rollouts), []).append(index)
    entries: dict[int, GroupWithAdvantages] = {}
    for indices in indices_by_size.values():
        rows = compute_advantages(session, [groups[index] for index in indices]).tolist()
        for index, row in zip(indices, rows, strict=True):
            entries[index] = GroupWithAdvantages(group=groups[index], advantages=tuple(row))
    return [entries[index] for index in range(len(groups))]


def compute_advantages(session: Session, groups: Sequence[Group]) -> Tensor:
    """`(P, G)`: from the verified reward and DAPO's penalty of overlong responses."""
    recipe = session.recipe
    rewards_PG = torch.tensor([[rollout.reward for rollout in group.rollouts] for group in groups])
    if recipe.sampling.overlong_buffer:
        lengths_PG = torch.tensor([[rollout.num_tokens for rollout in group.rollouts] for group in groups])
        penalty_N = overlong_penalty(
            lengths_PG.flatten(),
            max_tokens=recipe.sampling.max_new_tokens,
            buffer=recipe.sampling.overlong_buffer,
            penalty=recipe.sampling.overlong_penalty,
        )
        rewards_PG = rewards_PG + penalty_N.view_as(rewards_PG)
    baseline_PG = None
    if recipe.guide.inject.baseline == "on_policy":
        baseline_PG = torch.tensor([[not rollout.is_off_policy for rollout in group.rollouts] for group in groups])
    return group_advantages(
        rewards_PG, divide_by_std=recipe.loss.divide_by_std, eps=recipe.loss.adv_eps, baseline_PG=baseline_PG
    )


def to_log_group(on_policy: Group, mixed: Group) -> Group:
    """The group as it is recorded: all on-policy rollouts, then the injected ones. `Group.on_policy` reverses it."""
    injected = tuple(rollout for rollout in mixed.rollouts if rollout.is_off_policy)
    return replace(mixed, rollouts=on_policy.rollouts + injected)


def restore_prompt(session: Session, group: Group) -> Group:
    """A recorded group with what is not on record of its prompt: the row of the data, by which responses are verified,
    and the bytes of its images. Raises NpoError if the images are not the ones it was sampled with.
    """
    prompt = session.task.prompt(group.prompt.prompt_id)
    if [image.sha256 for image in prompt.images] != [image.sha256 for image in group.prompt.images]:
        raise NpoError(
            f"the images of prompt {prompt.prompt_id} changed since it was sampled",
            "restore the previous images, or start a new run with the new ones",
        )
    return replace(group, prompt=replace(group.prompt, images=prompt.images, columns=prompt.columns))


# The pool of failed prompts: which prompts the policy failed, and when


def collect_failed_prompts(
    groups: Sequence[Group], *, step: int, epochs: Sequence[int], limit: float
) -> tuple[FailedPrompt, ...]:
    """Prompts of which at most `limit` of the on-policy rollouts were correct; injected rollouts do not count."""
    return tuple(
        FailedPrompt(prompt_id=group.prompt.prompt_id, step=step, accuracy=accuracy, epoch=epoch)
        for group, epoch in zip(groups, epochs, strict=True)
        for accuracy in [group.on_policy.accuracy]
        if accuracy <= limit
    )


def update_failed_prompt_pool(
    before: Sequence[FailedPrompt], new: Sequence[FailedPrompt], *, size: int
) -> tuple[FailedPrompt, ...]:
    """The newest `size` failures, oldest first; within one step the last ones are kept.

    Of a prompt's failures with the same accuracy only the newest stays, which has its age: the pool grows with the
    number of prompts, not of steps.
    """
    newest: dict[tuple[str, float], FailedPrompt] = {}
    for failure in sorted((*before, *new), key=lambda failure: failure.step):
        key = failure.prompt_id, failure.accuracy
        newest.pop(key, None)
        newest[key] = failure
    return tuple(newest.values())[-size:]
