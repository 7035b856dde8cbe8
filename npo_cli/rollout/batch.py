"""The batch of one step: prompts drawn, answered, verified, others' trajectories seated, idle groups dropped.

A step that a killed process had already recorded is read back instead of sampled again: the pending batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from npo_cli.errors import NpoError
from npo_cli.losses.advantages import group_advantages, overlong_penalty
from npo_cli.rollout.mixing import GuidesByPrompt, InjectionPolicy, count_on_policy, inject_guides, select_on_policy
from npo_cli.seeds import derive_seed
from npo_cli.session.session import Session, sample_groups
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Group, Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveGuide:
    """A guide cache at work: which prompts it helps, and until when."""

    trajectories: GuidesByPrompt
    until_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts of a batch that are drawn alike."""

    prompts: tuple[Prompt, ...]
    seed_label: tuple[str | int, ...]
    """In every sampling seed, behind branch and step."""
    guides: GuidesByPrompt | None
    """Trajectories that may be seated; None where nobody is at work."""
    injection: InjectionPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Prompts for one step, and where the data order stands behind them."""

    prompt_batches: tuple[PromptBatch, ...]
    position: int


class OnlineGuide(Protocol):
    """Somebody who is asked while the batch is drawn."""

    def build_groups(
        self, part: PromptBatch, before: Sequence[Group], *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """The part's groups as the policy answered them, and with others in their slots; `before` is on record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWithAdvantages:
    """A (mixed) group and the advantage of each of its rollouts."""

    group: Group
    advantages: tuple[float, ...]

    @property
    def has_signal(self) -> bool:
        """Whether any rollout is better or worse than the group's mean."""
        return any(advantage != 0 for advantage in self.advantages)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one step saw and what it trains on."""

    on_policy: tuple[Group, ...]
    """Every group as the policy answered it."""
    mixed: tuple[Group, ...]
    """The same groups after others took their slots."""
    selected: tuple[GroupWithAdvantages, ...]
    """The groups trained on: all of them, or with dynamic sampling those that teach."""
    num_gen_batches: int
    is_recorded: bool
    """Read back from the journal instead of sampled."""
    position: int
    """Data cursor after this step."""


def add_advantages(session: Session, groups: Sequence[Group]) -> list[GroupWithAdvantages]:
    """Advantages of each (mixed) group; groups that others' trajectories made longer are a table of their own."""
    by_size: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        by_size.setdefault(len(group.rollouts), []).append(place)
    found: dict[int, GroupWithAdvantages] = {}
    for places in by_size.values():
        rows = compute_advantages(session, [groups[place] for place in places]).tolist()
        for place, row in zip(places, rows, strict=True):
            found[place] = GroupWithAdvantages(group=groups[place], advantages=tuple(row))
    return [found[place] for place in range(len(groups))]


def compute_advantages(session: Session, groups: Sequence[Group]) -> Tensor:
    """`(P, G)`: on the verified reward plus DAPO's penalty of overlong answers."""
    recipe = session.recipe
    rewards_PG = torch.tensor([[rollout.reward for rollout in group.rollouts] for group in groups])
    if recipe.sampling.overlong_buffer:
        lengths_PG = torch.tensor([[len(rollout.response_ids) for rollout in group.rollouts] for group in groups])
        penalty_N = overlong_penalty(
            lengths_PG.flatten(),
            max_tokens=recipe.sampling.max_new_tokens,
            buffer=recipe.sampling.overlong_buffer,
            penalty=recipe.sampling.overlong_penalty,
        )
        rewards_PG = rewards_PG + penalty_N.view_as(rewards_PG)
    own_PG = None
    if recipe.guide.inject.baseline == "on_policy":
        own_PG = torch.tensor([[not rollout.is_off_policy for rollout in group.rollouts] for group in groups])
    return group_advantages(
        rewards_PG, divide_by_std=recipe.loss.divide_by_std, eps=recipe.loss.adv_eps, baseline_PG=own_PG
    )


def to_log_group(own: Group, mixed: Group) -> Group:
    """The journal's view: all own rollouts, and behind them those of others that took a slot."""
    guests = tuple(rollout for rollout in mixed.rollouts if rollout.is_off_policy)
    return replace(mixed, rollouts=own.rollouts + guests)


def from_log_group(group: Group) -> Group:
    """The reverse of `recorded`."""
    return Group(prompt=group.prompt, rollouts=select_on_policy(group))


def restore_images(session: Session, group: Group) -> Group:
    """A group as it was recorded, with the task's own pictures; refused where these are others than were answered."""
    if not group.prompt.images:
        return group
    prompt = session.task.prompt(group.prompt.prompt_id)
    if [image.sha256 for image in prompt.images] != [image.sha256 for image in group.prompt.images]:
        raise NpoError(
            f"prompt {prompt.prompt_id} was answered with other pictures than this task has",
            "bring the old ones back, or start a new run with the new ones",
        )
    return replace(group, prompt=replace(group.prompt, images=prompt.images))


def make_injection_policy(session: Session, *, seed_name: str, step: int) -> InjectionPolicy:
    """The recipe's, with a seed of this step's own."""
    recipe = session.recipe
    return InjectionPolicy(
        gate=recipe.guide.inject.max_accuracy,
        slots=recipe.guide.inject.slots,
        compose=recipe.guide.inject.mode,
        group_size=recipe.train.group_size,
        seed=derive_seed(recipe.train.seed, "seat", seed_name, step),
    )


def plan_next_batch(
    session: Session, *, seed_name: str, step: int, position: int, guides: GuidesByPrompt | None
) -> BatchPlan:
    """The next prompts of the data order.

    The epoch is part of the label, so a small pool that wraps inside a step still gets fresh samples.
    """
    rule = make_injection_policy(session, seed_name=seed_name, step=step)
    count = session.recipe.train.prompts_per_step
    parts = [
        PromptBatch(prompts=tuple(prompts), seed_label=(epoch,), guides=guides, injection=rule)
        for epoch, prompts in _by_epoch(session, position, count)
    ]
    return BatchPlan(prompt_batches=tuple(parts), position=position + count)


def _by_epoch(session: Session, position: int, count: int) -> Iterator[tuple[int, list[Prompt]]]:
    """The next `count` prompts, split where an epoch ends."""
    size = len(session.task.train)
    end = position + count
    while position < end:
        stop = min(end, (position // size + 1) * size)
        indices = session.order.indices(position, stop - position)
        yield session.order.epoch(position), [session.task.train[index] for index in indices]
        position = stop


def sample_on_policy_groups(session: Session, part: PromptBatch, *, seed_name: str, step: int) -> list[Group]:
    """The part's prompts answered by the policy as it is; a slot that is given away in any case is not sampled."""
    by_count: dict[int, list[Prompt]] = {}
    for prompt in part.prompts:
        count = count_on_policy(part.injection, (part.guides or {}).get(prompt.prompt_id, ()))
        by_count.setdefault(count, []).append(prompt)
    found: dict[str, Group] = {}
    for count, prompts in by_count.items():
        label = (seed_name, step, *part.seed_label)
        groups = sample_groups(session, prompts, seed_label=label, slots=range(count), sampler_step=step - 1)
        found |= {group.prompt.prompt_id: group for group in groups}
    return [found[prompt.prompt_id] for prompt in part.prompts]


@dataclass(frozen=True, slots=True)
class CachedGuide:
    """Slots go to trajectories that are at hand, or to nobody."""

    session: Session

    def build_groups(
        self, part: PromptBatch, before: Sequence[Group], *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """Own answers, on record or fresh, and the same groups with the part's trajectories in their slots."""
        own = [from_log_group(group) for group in before] or sample_on_policy_groups(
            self.session, part, seed_name=seed_name, step=step
        )
        return own, own if part.guides is None else inject_guides(own, part.guides, part.injection)


def build_batch(
    session: Session,
    journal: RolloutLog,
    *,
    seed_name: str,
    step: int,
    position: int,
    active_guide: ActiveGuide | None,
    batch_plan: BatchPlan | None = None,
    online_guide: OnlineGuide | None = None,
) -> StepBatch:
    """Draw once, or with dynamic sampling until enough groups teach (after injection) or the limit is reached.

    `draw` says which prompts; None takes the next of the data order. `live` answers in the place of a cache.
    """
    recipe = session.recipe
    wanted = recipe.train.prompts_per_step
    guides = active_guide.trajectories if active_guide and step <= active_guide.until_step else None
    left = [restore_images(session, group) for group in journal.read_step(step) or ()]
    remembered = bool(left)
    own: list[Group] = []
    mixed: list[Group] = []
    chosen: list[GroupWithAdvantages] = []
    num_draws = 0
    while num_draws < (recipe.sampling.max_gen_batches if recipe.sampling.dynamic else 1):
        now = batch_plan or plan_next_batch(session, seed_name=seed_name, step=step, position=position, guides=guides)
        num_draws, position = num_draws + 1, now.position
        pairs = []
        for part in now.prompt_batches:
            before, left = left[: len(part.prompts)], left[len(part.prompts) :]
            pairs.append(
                (online_guide or CachedGuide(session)).build_groups(part, before, seed_name=seed_name, step=step)
            )
        own += chain.from_iterable(drawn for drawn, _ in pairs)
        seated = list(chain.from_iterable(seats for _, seats in pairs))
        mixed += seated
        weighed = add_advantages(session, seated)
        chosen += [entry for entry in weighed if entry.has_signal] if recipe.sampling.dynamic else weighed
        if len(chosen) >= wanted:
            break
    if not remembered:
        journal.write_step(step, [to_log_group(*pair) for pair in zip(own, mixed, strict=True)])
    return StepBatch(
        on_policy=tuple(own),
        mixed=tuple(mixed),
        selected=tuple(chosen[:wanted]),
        num_gen_batches=num_draws,
        is_recorded=remembered,
        position=position,
    )


def flatten_rollouts(groups: Sequence[Group]) -> list[Rollout]:
    """All rollouts, in order."""
    return [rollout for group in groups for rollout in group.rollouts]
