"""ExGRPO inside the loop: which prompts of a batch are replayed with which stored answer, and what the batch leaves.

The memory is part of the training state; what is remembered and drawn is decided in `guide/experience.py`.
"""

from collections.abc import Mapping, Sequence

from npo_cli.errors import NpoError
from npo_cli.guide.experience import Buckets, GroupResult, start_collecting, add_successes, sample_replay_prompts
from npo_cli.guide.mix import InjectionPolicy
from npo_cli.guide_records import ReplayBuffer, GuideRollout, Success
from npo_cli.policy.logprobs import TokenRow
from npo_cli.records import Group, Prompt
from npo_cli.seeds import derive_seed
from npo_cli.stages.batches import BatchPlan, PromptBatch, StepBatch, make_injection_policy
from npo_cli.stages.row_scores import ResponseLogprobs, run_logprob_pass
from npo_cli.stages.world import Session

REPLAY = "replay"
"""In the sampling seeds of replayed prompts, in the place of the epoch."""


def check_single_guide_source(world: Session, *, other: str) -> None:
    """Stored successes and a guide cache cannot both own the slots of a batch."""
    if world.recipe.guide.experience.replay_fraction:
        raise NpoError(
            f"guide.experience.replay_fraction replays the run's own successes, and {other} fills the same slots",
            "one of them: set guide.experience.replay_fraction=0 when the run is made, or leave the guide out",
        )


def build_replay_batch(world: Session, memory: ReplayBuffer, *, seed_name: str, step: int, position: int) -> BatchPlan:
    """floor(share B) replayed prompts, or as many as are stored, and the rest from the data order."""
    recipe = world.recipe
    wanted = recipe.train.prompts_per_step
    num_replayed = min(len(memory.successes), int(recipe.guide.experience.replay_fraction * wanted))
    fresh, behind = next_prompts(world, memory, position, count=wanted - num_replayed)
    names = sample_replay_prompts(
        memory,
        num_replayed,
        buckets=make_buckets(world),
        seed=derive_seed(recipe.train.seed, "experience", seed_name, step),
        exclude={prompt.prompt_id for _, prompt in fresh},
    )
    if len(names) < num_replayed:
        fresh, behind = next_prompts(world, memory, position, count=wanted - len(names), exclude=names)
    rule = make_injection_policy(world, seed_name=seed_name, step=step)
    parts = [
        PromptBatch(prompts=tuple(prompt for at, prompt in fresh if at == epoch), seed_label=(epoch,), guides=None, injection=rule)
        for epoch in dict.fromkeys(epoch for epoch, _ in fresh)
    ]
    if names:
        parts.append(_replayed(world, memory, names, rule=rule))
    return BatchPlan(prompt_batches=tuple(parts), position=behind)


def make_buckets(world: Session) -> Buckets:
    """The recipe's preference among stored prompts."""
    settings = world.recipe.guide.experience
    size = world.recipe.train.group_size
    return Buckets(group_size=size, units=settings.bucket_units, sigma=settings.bucket_sigma)


def next_prompts(
    world: Session, memory: ReplayBuffer, position: int, *, count: int, exclude: Sequence[str] = ()
) -> tuple[list[tuple[int, Prompt]], int]:
    """The next `count` prompts with their epochs, those passed over that retired in an earlier one; and the cursor.

    Where fewer than a batch are left unretired, nobody is passed over: a batch is never short.
    """
    pool = world.task.train
    skip = len(pool) - len(memory.retired_epochs) >= world.recipe.train.prompts_per_step
    found: list[tuple[int, Prompt]] = []
    while len(found) < count:
        prompt, epoch = pool[world.order.indices(position, 1)[0]], world.order.epoch(position)
        position += 1
        gone = skip and memory.retired_epochs.get(prompt.prompt_id, epoch) < epoch
        if not gone and prompt.prompt_id not in exclude:
            found.append((epoch, prompt))
    return found, position


def _replayed(world: Session, memory: ReplayBuffer, names: Sequence[str], *, rule: InjectionPolicy) -> PromptBatch:
    """Every one of these groups gives a slot to the best of its stored answers."""
    known = {prompt.prompt_id: prompt for prompt in world.task.train}
    best = select_successes(world, {name: memory.successes[name] for name in names}, known, seed=rule.seed)
    guides = {
        name: (
            GuideRollout(
                prompt_id=name,
                response_ids=success.response_ids,
                behavior_logps=success.behavior_logps,
                text=success.text,
                verdict="correct",
                guide_step=success.step,
                num_sampled=rule.group_size,
                num_correct=memory.num_correct[name],
                source="past",
            ),
        )
        for name, success in best.items()
    }
    open_rule = InjectionPolicy(gate=1.0, slots=1, compose=rule.compose, group_size=rule.group_size, seed=rule.seed)
    return PromptBatch(prompts=tuple(known[name] for name in names), seed_label=(REPLAY,), guides=guides, injection=open_rule)


def select_successes(
    world: Session, stored: Mapping[str, Sequence[Success]], prompts: Mapping[str, Prompt], *, seed: int
) -> dict[str, Success]:
    """Of each prompt's answers that with the least entropy or NLL under the present policy, means over its tokens."""
    how = world.recipe.guide.experience.select
    if how == "random":
        return {name: each[derive_seed(seed, "stored", name) % len(each)] for name, each in stored.items()}
    several = [(name, success) for name, each in stored.items() if len(each) > 1 for success in each]
    rows = [_row(world, prompts[name], success.response_ids) for name, success in several]
    costs: dict[str, list[float]] = {}
    for (name, _), scores in zip(several, run_logprob_pass(world.policy, world.recipe, rows), strict=True):
        costs.setdefault(name, []).append(_cost(scores, how))
    return {name: each[_first_least(costs[name]) if name in costs else 0] for name, each in stored.items()}


def _cost(scores: ResponseLogprobs, how: str) -> float:
    return float(scores.entropies_T.mean()) if how == "entropy" else -float(scores.logps_T.mean())


def _first_least(costs: Sequence[float]) -> int:
    return min(range(len(costs)), key=costs.__getitem__)


def _row(world: Session, prompt: Prompt, response_ids: tuple[int, ...]) -> TokenRow:
    return world.policy.row(prompt, response_ids)


def update_buffer(world: Session, batch: StepBatch, memory: ReplayBuffer, *, sampler_step: int, position: int) -> ReplayBuffer:
    """The memory after this batch. Asked before the update: log-probabilities are those of the weights that wrote."""
    settings = world.recipe.guide.experience
    rewards = [rollout.reward for group in batch.on_policy for rollout in group.rollouts]
    outcomes = [] if not memory.is_collecting else _outcomes(world, batch, before=sampler_step, position=position)
    memory = add_successes(memory, outcomes, retire=settings.retire_solved)
    return start_collecting(memory, sum(rewards) / len(rewards), start=settings.start_accuracy)


def _outcomes(world: Session, batch: StepBatch, *, before: int, position: int) -> list[GroupResult]:
    solved = [(group, _correct(group)) for group in batch.mixed]
    partly = [(group, right) for group, right in solved if 0 < len(right) < len(group.rollouts)]
    own = [(group, rollout) for group, right in partly for rollout in right if not rollout.foreign]
    rows = [_row(world, group.prompt, rollout.response_ids) for group, rollout in own]
    fresh: dict[str, list[Success]] = {}
    for (group, rollout), scores in zip(own, run_logprob_pass(world.policy, world.recipe, rows), strict=True):
        logps = tuple(scores.logps_T.tolist())
        success = Success(response_ids=rollout.response_ids, behavior_logps=logps, text=rollout.text, step=before)
        fresh.setdefault(group.prompt.prompt_id, []).append(success)
    return [
        GroupResult(
            prompt_id=group.prompt.prompt_id,
            num_correct=len(right),
            group_size=len(group.rollouts),
            epoch=world.order.epoch(position),
            new_successes=tuple(fresh.get(group.prompt.prompt_id, ())),
        )
        for group, right in solved
    ]


def _correct(group: Group) -> list:
    return [rollout for rollout in group.rollouts if rollout.verdict == "correct"]
