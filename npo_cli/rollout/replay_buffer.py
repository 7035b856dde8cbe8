"""ExGRPO's replay buffer of the run's own correct responses: what enters, what leaves, what is replayed.

The buffer is part of the training state. Its functions map one buffer to the next (arXiv 2510.02245). Which
of a prompt's responses is replayed depends on the current policy's log-probabilities.
"""

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from npo_cli.config.guides import ExperienceSettings
from npo_cli.errors import NpoError
from npo_cli.rollout.batch import (
    BatchPlan,
    PromptBatch,
    StepBatch,
    batches_by_epoch,
    draw_from_order,
    open_mix_strategy,
)
from npo_cli.rollout.mixing import MixStrategy
from npo_cli.seeds import derive_seed
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.session import Session
from npo_cli.types.guides import ReplayBuffer, Success
from npo_cli.types.rollouts import Group, Prompt, Rollout

REPLAY = "replay"
"""In the sampling seeds of replayed prompts, in place of the epoch."""


def start_collecting(buffer: ReplayBuffer, accuracy: float, *, start: float) -> ReplayBuffer:
    """Collection begins after the first batch whose accuracy exceeds `start`, and never ends."""
    return replace(buffer, is_collecting=buffer.is_collecting or accuracy > start)


def add_successes(
    buffer: ReplayBuffer,
    groups: Sequence[Group],
    new: Mapping[str, Sequence[Success]],
    *,
    epoch: int,
    retire: bool,
    most: int,
) -> ReplayBuffer:
    """Add the new successes of partly solved groups, each text once; retire the prompts of wholly solved groups.

    All slots of a group count, the replayed one included. `new`: on-policy correct responses by prompt id. A prompt
    keeps its `most` newest ones.
    """
    if not buffer.is_collecting:
        return buffer
    successes, num_correct, retired = dict(buffer.successes), dict(buffer.num_correct), dict(buffer.retired_epochs)
    for group in groups:
        prompt_id = group.prompt.prompt_id
        if group.num_correct == len(group.rollouts) and retire:
            successes.pop(prompt_id, None)
            num_correct.pop(prompt_id, None)
            retired.setdefault(prompt_id, epoch)
        elif 0 < group.num_correct < len(group.rollouts):
            by_text = {success.text: success for success in successes.get(prompt_id, ())}
            for success in new.get(prompt_id, ()):
                by_text.setdefault(success.text, success)
            successes[prompt_id] = tuple(by_text.values())[-most:]
            num_correct[prompt_id] = group.num_correct
    return replace(buffer, successes=successes, num_correct=num_correct, retired_epochs=retired)


def bucket_probabilities(counts: Collection[int], settings: ExperienceSettings, *, group_size: int) -> dict[int, float]:
    """Probability of each non-empty bucket k: N(k; n/2, sigma) in counts, or N(k/n; 1/2, sigma) in rates, normalized.

    A bucket is the prompts with k correct of n rollouts; its probability does not depend on their number. In counts
    with sigma = 1 and n = 8 the weights are 1, .607, .135 and .011 at |k - 4| = 0 to 3; in rates they are almost flat
    (the code and the text of the paper differ).
    """
    scale = 1.0 if settings.bucket_units == "count" else 1.0 / group_size
    distances = {count: (count - group_size / 2) * scale / settings.bucket_sigma for count in sorted(set(counts))}
    weights = {count: math.exp(-(distance**2) / 2) for count, distance in distances.items()}
    total = sum(weights.values())
    return {count: weight / total for count, weight in weights.items()}


def sample_replay_prompts(
    buffer: ReplayBuffer,
    num_prompts: int,
    settings: ExperienceSettings,
    *,
    group_size: int,
    seed: int,
    exclude: Collection[str] = (),
) -> list[str]:
    """Ids of prompts to replay: a random bucket, then uniform inside it without replacement.

    What an emptied bucket lacks is drawn from the others. Fewer are returned if the buffer holds fewer.
    """
    rng = random.Random(seed)
    waiting: dict[int, list[str]] = {}
    for prompt_id in sorted(buffer.successes.keys() - set(exclude)):
        waiting.setdefault(buffer.num_correct[prompt_id], []).append(prompt_id)
    for prompts in waiting.values():
        rng.shuffle(prompts)
    chosen: list[str] = []
    while waiting and len(chosen) < num_prompts:
        probabilities = bucket_probabilities(waiting.keys(), settings, group_size=group_size)
        # Python's own generator: a seed means the same under every numpy.
        picks = rng.choices(list(probabilities), weights=list(probabilities.values()), k=num_prompts - len(chosen))
        for bucket in picks:
            if waiting.get(bucket):
                chosen.append(waiting[bucket].pop())
        waiting = {bucket: prompts for bucket, prompts in waiting.items() if prompts}
    return chosen


def buffer_metrics(buffer: ReplayBuffer) -> Mapping[str, float]:
    """Metrics of the buffer's content."""
    return {
        "experience/prompts": float(len(buffer.successes)),
        "experience/responses": float(sum(map(len, buffer.successes.values()))),
        "experience/retired": float(len(buffer.retired_epochs)),
    }


def check_single_guide_source(session: Session, *, other: str) -> None:
    """Raise NpoError if ExGRPO and another guide would fill the same slots."""
    if session.recipe.guide.experience.replay_fraction:
        raise NpoError(
            f"guide.experience.replay_fraction replays the run's own successes, and {other} fills the same slots",
            "use one of them: set guide.experience.replay_fraction=0 when the run is created, or leave the guide out",
        )


def build_replay_batch(
    session: Session, buffer: ReplayBuffer, *, seed_name: str, step: int, position: int
) -> BatchPlan:
    """floor(replay_fraction B) replayed prompts, or as many as are stored, and the rest from the data order."""
    recipe = session.recipe
    size = recipe.train.prompts_per_step
    num_replayed = min(len(buffer.successes), int(recipe.guide.experience.replay_fraction * size))
    fresh, after = draw_from_order(session, position, count=size - num_replayed, skips=skip_retired(session, buffer))
    prompt_ids = sample_replay_prompts(
        buffer,
        num_replayed,
        recipe.guide.experience,
        group_size=recipe.train.group_size,
        seed=derive_seed(recipe.train.seed, "experience", seed_name, step),
        exclude={prompt.prompt_id for _, prompt in fresh},
    )
    if len(prompt_ids) < num_replayed:
        skips = skip_retired(session, buffer, exclude=prompt_ids)
        fresh, after = draw_from_order(session, position, count=size - len(prompt_ids), skips=skips)
    strategy = open_mix_strategy(session, seed_name=seed_name, step=step)
    batches = batches_by_epoch(fresh, guides=None, strategy=strategy)
    if prompt_ids:
        batches.append(_replay_prompts(session, buffer, prompt_ids, strategy))
    return BatchPlan(prompt_batches=tuple(batches), position=after)


def skip_retired(
    session: Session, buffer: ReplayBuffer, *, exclude: Sequence[str] = ()
) -> Callable[[Prompt, int], bool]:
    """Whether the data order passes over a prompt in an epoch: prompts of `exclude`, and those retired in an earlier
    epoch, unless fewer than a batch are left."""
    skip = len(session.task.train) - len(buffer.retired_epochs) >= session.recipe.train.prompts_per_step

    def skips(prompt: Prompt, epoch: int) -> bool:
        is_retired = skip and buffer.retired_epochs.get(prompt.prompt_id, epoch) < epoch
        return is_retired or prompt.prompt_id in exclude

    return skips


def _replay_prompts(
    session: Session, buffer: ReplayBuffer, prompt_ids: Sequence[str], strategy: MixStrategy
) -> PromptBatch:
    """Groups that each give one slot to a stored response, whatever their accuracy."""
    known = {prompt.prompt_id: prompt for prompt in session.task.train}
    stored = {prompt_id: buffer.successes[prompt_id] for prompt_id in prompt_ids}
    guides = {
        prompt_id: (
            Rollout(
                prompt_id=prompt_id,
                slot=0,
                response_ids=success.response_ids,
                behavior_logps=success.behavior_logps,
                text=success.text,
                finished=True,
                sampler_step=success.step,
                verdict="correct",
                reward=success.reward,
                source="past",
            ),
        )
        for prompt_id, success in select_successes(session, stored, known, seed=strategy.seed).items()
    }
    return PromptBatch(
        prompts=tuple(known[prompt_id] for prompt_id in prompt_ids),
        seed_label=(REPLAY,),
        guides=guides,
        strategy=replace(strategy, settings=strategy.settings.model_copy(update={"max_accuracy": 1.0, "slots": 1})),
    )


def select_successes(
    session: Session, stored: Mapping[str, Sequence[Success]], prompts: Mapping[str, Prompt], *, seed: int
) -> dict[str, Success]:
    """One stored response per prompt: of least entropy or NLL per token under the current policy, or a random one."""
    how = session.recipe.guide.experience.select
    if how == "random":
        return {name: each[derive_seed(seed, "stored", name) % len(each)] for name, each in stored.items()}
    candidates = [(name, success) for name, each in stored.items() if len(each) > 1 for success in each]
    rows = [session.policy.row(prompts[name], success.response_ids) for name, success in candidates]
    columns = ["entropies"] if how == "entropy" else []
    scored = run_logprob_pass(session.policy, session.recipe, rows, columns=columns)
    costs: dict[str, list[float]] = {}
    for (name, _), scores in zip(candidates, scored, strict=True):
        cost_T = -scores.logps_T if scores.entropies_T is None else scores.entropies_T
        costs.setdefault(name, []).append(float(cost_T.mean()))
    best = {name: each.index(min(each)) for name, each in costs.items()}
    return {name: each[best.get(name, 0)] for name, each in stored.items()}


def update_buffer(
    session: Session, batch: StepBatch, buffer: ReplayBuffer, *, sampler_step: int, position: int
) -> ReplayBuffer:
    """The buffer after this batch. Called before the update: log-probabilities are those of the sampling weights."""
    settings = session.recipe.guide.experience
    if buffer.is_collecting:
        new = _on_policy_successes(session, batch.mixed, sampler_step=sampler_step)
        epoch = session.order.epoch(position)
        buffer = add_successes(
            buffer, batch.mixed, new, epoch=epoch, retire=settings.retire_solved, most=settings.max_per_prompt
        )
    num_rollouts = sum(len(group.rollouts) for group in batch.on_policy)
    accuracy = sum(group.num_correct for group in batch.on_policy) / num_rollouts
    return start_collecting(buffer, accuracy, start=settings.start_accuracy)


def _on_policy_successes(session: Session, groups: Sequence[Group], *, sampler_step: int) -> dict[str, list[Success]]:
    """Correct on-policy responses of the partly solved groups, by prompt id."""
    pairs = [
        (group.prompt, rollout)
        for group in groups
        if group.num_correct < len(group.rollouts)
        for rollout in group.rollouts
        if rollout.is_correct and not rollout.is_off_policy
    ]
    rows = [session.policy.row(prompt, rollout.response_ids) for prompt, rollout in pairs]
    successes: dict[str, list[Success]] = {}
    for (prompt, rollout), scores in zip(pairs, run_logprob_pass(session.policy, session.recipe, rows), strict=True):
        logps = tuple(scores.logps_T.tolist())
        success = Success(
            response_ids=rollout.response_ids,
            behavior_logps=logps,
            text=rollout.text,
            step=sampler_step,
            reward=rollout.reward,
        )
        successes.setdefault(prompt.prompt_id, []).append(success)
    return successes
