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
from npo_cli.guide.mix import Guides, SeatRule, num_own, own_rollouts, seat_guides
from npo_cli.objective.advantages import group_advantages, overlong_penalty
from npo_cli.records import Group, Prompt, Rollout
from npo_cli.run_dir.rollouts import RolloutJournal
from npo_cli.seeds import derive_seed
from npo_cli.stages.world import World, answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """A guide cache at work: which prompts it helps, and until when."""

    trajectories: Guides
    until_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Prompts of a batch that are drawn alike."""

    prompts: tuple[Prompt, ...]
    label: tuple[str | int, ...]
    """In every sampling seed, behind branch and step."""
    guides: Guides | None
    """Trajectories that may be seated; None where nobody is at work."""
    rule: SeatRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Prompts for one step, and where the data order stands behind them."""

    parts: tuple[Part, ...]
    position: int


class Live(Protocol):
    """Somebody who is asked while the batch is drawn."""

    def filled(
        self, part: Part, before: Sequence[Group], *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """The part's groups as the policy answered them, and with others in their slots; `before` is on record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWithAdvantages:
    """A (mixed) group and the advantage of each of its rollouts."""

    group: Group
    advantages: tuple[float, ...]

    @property
    def teaches(self) -> bool:
        """Whether any rollout is better or worse than the group's mean."""
        return any(advantage != 0 for advantage in self.advantages)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one step saw and what it trains on."""

    own: tuple[Group, ...]
    """Every group as the policy answered it."""
    mixed: tuple[Group, ...]
    """The same groups after others took their slots."""
    chosen: tuple[GroupWithAdvantages, ...]
    """The groups trained on: all of them, or with dynamic sampling those that teach."""
    num_draws: int
    remembered: bool
    """Read back from the journal instead of sampled."""
    position: int
    """Data cursor after this step."""


def with_advantages(world: World, groups: Sequence[Group]) -> list[GroupWithAdvantages]:
    """Advantages of each (mixed) group; groups that others' trajectories made longer are a table of their own."""
    by_size: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        by_size.setdefault(len(group.rollouts), []).append(place)
    found: dict[int, GroupWithAdvantages] = {}
    for places in by_size.values():
        rows = advantages_of(world, [groups[place] for place in places]).tolist()
        for place, row in zip(places, rows, strict=True):
            found[place] = GroupWithAdvantages(group=groups[place], advantages=tuple(row))
    return [found[place] for place in range(len(groups))]


def advantages_of(world: World, groups: Sequence[Group]) -> Tensor:
    """`(P, G)`: on the verified reward plus DAPO's penalty of overlong answers."""
    recipe = world.recipe
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
        own_PG = torch.tensor([[not rollout.foreign for rollout in group.rollouts] for group in groups])
    return group_advantages(
        rewards_PG, divide_by_std=recipe.loss.divide_by_std, eps=recipe.loss.adv_eps, baseline_PG=own_PG
    )


def recorded(own: Group, mixed: Group) -> Group:
    """The journal's view: all own rollouts, and behind them those of others that took a slot."""
    guests = tuple(rollout for rollout in mixed.rollouts if rollout.foreign)
    return replace(mixed, rollouts=own.rollouts + guests)


def own_part(group: Group) -> Group:
    """The reverse of `recorded`."""
    return Group(prompt=group.prompt, rollouts=own_rollouts(group))


def with_pictures(world: World, group: Group) -> Group:
    """A group as it was recorded, with the task's own pictures; refused where these are others than were answered."""
    if not group.prompt.images:
        return group
    prompt = world.task.prompt(group.prompt.prompt_id)
    if [image.sha256 for image in prompt.images] != [image.sha256 for image in group.prompt.images]:
        raise NpoError(
            f"prompt {prompt.prompt_id} was answered with other pictures than this task has",
            "bring the old ones back, or start a new run with the new ones",
        )
    return replace(group, prompt=replace(group.prompt, images=prompt.images))


def seat_rule(world: World, *, seed_name: str, step: int) -> SeatRule:
    """The recipe's, with a seed of this step's own."""
    recipe = world.recipe
    return SeatRule(
        gate=recipe.guide.inject.max_accuracy,
        slots=recipe.guide.inject.slots,
        compose=recipe.guide.inject.mode,
        group_size=recipe.train.group_size,
        seed=derive_seed(recipe.train.seed, "seat", seed_name, step),
    )


def window(world: World, *, seed_name: str, step: int, position: int, guides: Guides | None) -> Draw:
    """The next prompts of the data order.

    The epoch is part of the label, so a small pool that wraps inside a step still gets fresh samples.
    """
    rule = seat_rule(world, seed_name=seed_name, step=step)
    count = world.recipe.train.prompts_per_step
    parts = [
        Part(prompts=tuple(prompts), label=(epoch,), guides=guides, rule=rule)
        for epoch, prompts in _by_epoch(world, position, count)
    ]
    return Draw(parts=tuple(parts), position=position + count)


def _by_epoch(world: World, position: int, count: int) -> Iterator[tuple[int, list[Prompt]]]:
    """The next `count` prompts, split where an epoch ends."""
    size = len(world.task.train)
    end = position + count
    while position < end:
        stop = min(end, (position // size + 1) * size)
        indices = world.order.indices(position, stop - position)
        yield world.order.epoch(position), [world.task.train[index] for index in indices]
        position = stop


def answered(world: World, part: Part, *, seed_name: str, step: int) -> list[Group]:
    """The part's prompts answered by the policy as it is; a slot that is given away in any case is not sampled."""
    by_count: dict[int, list[Prompt]] = {}
    for prompt in part.prompts:
        count = num_own(part.rule, (part.guides or {}).get(prompt.prompt_id, ()))
        by_count.setdefault(count, []).append(prompt)
    found: dict[str, Group] = {}
    for count, prompts in by_count.items():
        label = (seed_name, step, *part.label)
        groups = answer(world, prompts, label=label, slots=range(count), sampler_step=step - 1)
        found |= {group.prompt.prompt_id: group for group in groups}
    return [found[prompt.prompt_id] for prompt in part.prompts]


@dataclass(frozen=True, slots=True)
class Cached:
    """Slots go to trajectories that are at hand, or to nobody."""

    world: World

    def filled(
        self, part: Part, before: Sequence[Group], *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """Own answers, on record or fresh, and the same groups with the part's trajectories in their slots."""
        own = [own_part(group) for group in before] or answered(self.world, part, seed_name=seed_name, step=step)
        return own, own if part.guides is None else seat_guides(own, part.guides, part.rule)


def draw_batch(
    world: World,
    journal: RolloutJournal,
    *,
    seed_name: str,
    step: int,
    position: int,
    guidance: Guidance | None,
    draw: Draw | None = None,
    live: Live | None = None,
) -> StepBatch:
    """Draw once, or with dynamic sampling until enough groups teach (after injection) or the limit is reached.

    `draw` says which prompts; None takes the next of the data order. `live` answers in the place of a cache.
    """
    recipe = world.recipe
    wanted = recipe.train.prompts_per_step
    guides = guidance.trajectories if guidance and step <= guidance.until_step else None
    left = [with_pictures(world, group) for group in journal.read_step(step) or ()]
    remembered = bool(left)
    own: list[Group] = []
    mixed: list[Group] = []
    chosen: list[GroupWithAdvantages] = []
    num_draws = 0
    while num_draws < (recipe.sampling.max_gen_batches if recipe.sampling.dynamic else 1):
        now = draw or window(world, seed_name=seed_name, step=step, position=position, guides=guides)
        num_draws, position = num_draws + 1, now.position
        pairs = []
        for part in now.parts:
            before, left = left[: len(part.prompts)], left[len(part.prompts) :]
            pairs.append((live or Cached(world)).filled(part, before, seed_name=seed_name, step=step))
        own += chain.from_iterable(drawn for drawn, _ in pairs)
        seated = list(chain.from_iterable(seats for _, seats in pairs))
        mixed += seated
        weighed = with_advantages(world, seated)
        chosen += [entry for entry in weighed if entry.teaches] if recipe.sampling.dynamic else weighed
        if len(chosen) >= wanted:
            break
    if not remembered:
        journal.write_step(step, [recorded(*pair) for pair in zip(own, mixed, strict=True)])
    return StepBatch(
        own=tuple(own),
        mixed=tuple(mixed),
        chosen=tuple(chosen[:wanted]),
        num_draws=num_draws,
        remembered=remembered,
        position=position,
    )


def rollouts_of(groups: Sequence[Group]) -> list[Rollout]:
    """All rollouts, in order."""
    return [rollout for group in groups for rollout in group.rollouts]
