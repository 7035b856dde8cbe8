"""The batch of one step: prompts drawn, answered, verified, a guide seated, groups without advantage dropped.

A step that a killed process had already recorded is read back instead of sampled again: the pending batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from npo_cli.guide.mix import seat_guides
from npo_cli.objective.advantages import group_advantages, overlong_penalty
from npo_cli.records import Group, GuideTrajectory, Rollout
from npo_cli.run_dir.rollouts import RolloutJournal
from npo_cli.stages.world import World, answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """A guide cache at work: which prompts it helps, and until when."""

    trajectories: Mapping[str, GuideTrajectory]
    until_step: int


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
    """The same groups after a guide took its slots."""
    chosen: tuple[GroupWithAdvantages, ...]
    """The groups trained on: all of them, or with dynamic sampling those that teach."""
    num_draws: int
    remembered: bool
    """Read back from the journal instead of sampled."""
    position: int
    """Data cursor after this step."""


def with_advantages(world: World, groups: Sequence[Group]) -> list[GroupWithAdvantages]:
    """Advantages of each (mixed) group, on the verified reward plus DAPO's penalty of overlong answers."""
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
    advantages_PG = group_advantages(rewards_PG, divide_by_std=recipe.loss.divide_by_std, eps=recipe.loss.adv_eps)
    rows = advantages_PG.tolist()
    return [GroupWithAdvantages(group=group, advantages=tuple(row)) for group, row in zip(groups, rows, strict=True)]


def recorded(own: Group, mixed: Group) -> Group:
    """The journal's view: all own rollouts, and behind them the guide's that took a slot."""
    guests = tuple(rollout for rollout in mixed.rollouts if rollout.source == "guide")
    return replace(mixed, rollouts=own.rollouts + guests)


def own_part(group: Group) -> Group:
    """The reverse of `recorded`."""
    own = tuple(rollout for rollout in group.rollouts if rollout.source == "own")
    return Group(prompt=group.prompt, rollouts=own)


def fresh_groups(world: World, *, seed_name: str, step: int, position: int) -> list[Group]:
    """One draw of prompts from the data order, answered by the policy as it is.

    The epoch is part of the label, so a small pool that wraps inside a step still gets fresh samples.
    """
    recipe = world.recipe
    groups = []
    for epoch, prompts in _by_epoch(world, position, recipe.train.prompts_per_step):
        label = (seed_name, step, epoch)
        slots = range(recipe.train.group_size)
        groups += answer(world, prompts, label=label, slots=slots, sampler_step=step - 1)
    return groups


def _by_epoch(world: World, position: int, count: int) -> Iterator[tuple[int, list]]:
    """The next `count` prompts, split where an epoch ends."""
    size = len(world.task.train)
    end = position + count
    while position < end:
        stop = min(end, (position // size + 1) * size)
        indices = world.order.indices(position, stop - position)
        yield world.order.epoch(position), [world.task.train[index] for index in indices]
        position = stop


def draw_batch(
    world: World, journal: RolloutJournal, *, seed_name: str, step: int, position: int, guidance: Guidance | None
) -> StepBatch:
    """Draw once, or with dynamic sampling until enough groups teach (after injection) or the limit is reached."""
    recipe = world.recipe
    wanted = recipe.train.prompts_per_step
    remembered = [own_part(group) for group in journal.read_step(step) or ()]
    own: list[Group] = []
    mixed: list[Group] = []
    chosen: list[GroupWithAdvantages] = []
    num_draws = 0
    while num_draws < (recipe.sampling.max_gen_batches if recipe.sampling.dynamic else 1):
        cursor = position + num_draws * wanted
        drawn = remembered[num_draws * wanted :][:wanted] or fresh_groups(
            world, seed_name=seed_name, step=step, position=cursor
        )
        num_draws += 1
        seated = _seated(drawn, guidance if guidance and step <= guidance.until_step else None, recipe.inject.gate)
        own += drawn
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
        remembered=bool(remembered),
        position=position + num_draws * wanted,
    )


def _seated(groups: Sequence[Group], guidance: Guidance | None, gate: float) -> Sequence[Group]:
    return groups if guidance is None else seat_guides(groups, guidance.trajectories, gate=gate)


def rollouts_of(groups: Sequence[Group]) -> list[Rollout]:
    """All rollouts, in order."""
    return [rollout for group in groups for rollout in group.rollouts]
