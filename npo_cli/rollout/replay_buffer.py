"""ExGRPO inside the loop: which prompts of a batch are replayed with which stored answer, and what the batch leaves.

The memory is part of the training state; what is remembered and drawn is decided in `guide/experience.py`.

ExGRPO's memory of past successes: what enters it, what leaves it, and which prompts are replayed.

Functions from one memory to the next (arXiv 2510.02245; algorithms, section 6). It scores nothing: which of a prompt's
answers is replayed depends on the present policy, and is the stage's to ask.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from npo_cli.errors import NpoError
from npo_cli.policy.logprobs import TokenRow
from npo_cli.rollout.batch import BatchPlan, PromptBatch, StepBatch, make_injection_policy
from npo_cli.rollout.mixing import InjectionPolicy
from npo_cli.seeds import derive_seed
from npo_cli.session.logprob_pass import ResponseLogprobs, run_logprob_pass
from npo_cli.session.session import Session
from npo_cli.types.guides import GuideRollout, ReplayBuffer, Success
from npo_cli.types.rollouts import Group, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupResult:
    """One group of the batch, all slots counted, the replayed one included."""

    prompt_id: str
    num_correct: int
    group_size: int
    epoch: int
    new_successes: tuple[Success, ...]
    """The policy's own correct responses of this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """How prompts are preferred by the number of correct rollouts in their newest group."""

    group_size: int
    units: Literal["count", "rate"]
    sigma: float


def start_collecting(memory: ReplayBuffer, success_rate: float, *, start: float) -> ReplayBuffer:
    """Collection begins after the first batch with a success rate above `start`, and never ends."""
    return replace(memory, is_collecting=memory.is_collecting or success_rate > start)


def add_successes(memory: ReplayBuffer, outcomes: Sequence[GroupResult], *, retire: bool) -> ReplayBuffer:
    """Partly solved groups leave their correct responses, each text once; a wholly solved prompt leaves the memory."""
    if not memory.is_collecting:
        return memory
    successes, num_correct, retired = dict(memory.successes), dict(memory.num_correct), dict(memory.retired_epochs)
    for outcome in outcomes:
        if outcome.num_correct == outcome.group_size and retire:
            successes.pop(outcome.prompt_id, None)
            num_correct.pop(outcome.prompt_id, None)
            retired.setdefault(outcome.prompt_id, outcome.epoch)
        elif 0 < outcome.num_correct < outcome.group_size:
            known = {success.text: success for success in (*successes.get(outcome.prompt_id, ()),)}
            for success in outcome.new_successes:
                known.setdefault(success.text, success)
            successes[outcome.prompt_id] = tuple(known.values())
            num_correct[outcome.prompt_id] = outcome.num_correct
    return replace(memory, successes=successes, num_correct=num_correct, retired_epochs=retired)


def bucket_probabilities(counts: Collection[int], buckets: Buckets) -> dict[int, float]:
    """Probability of each non-empty bucket k: N(k; n/2, sigma) in counts, or N(k/n; 1/2, sigma) in rates, normalised.

    A bucket has one mass however many prompts lie in it. In counts with sigma = 1 and n = 8 the weights are 1, .607,
    .135 and .011 at |k - 4| = 0 to 3; in rates they are almost flat (the code and the text of the paper differ).
    """
    scale = 1.0 if buckets.units == "count" else 1.0 / buckets.group_size
    distance = {count: (count - buckets.group_size / 2) * scale / buckets.sigma for count in sorted(set(counts))}
    weights = {count: math.exp(-(away**2) / 2) for count, away in distance.items()}
    total = sum(weights.values())
    return {count: weight / total for count, weight in weights.items()}


def sample_replay_prompts(
    memory: ReplayBuffer, num_prompts: int, *, buckets: Buckets, seed: int, exclude: Collection[str] = ()
) -> list[str]:
    """Prompts to be replayed: bucket by bucket at random, uniform inside and without replacement.

    What an emptied bucket cannot give is drawn from the others. Fewer come where the memory holds fewer.
    """
    rng = random.Random(seed)
    waiting: dict[int, list[str]] = {}
    for prompt_id in sorted(memory.successes.keys() - set(exclude)):
        waiting.setdefault(memory.num_correct[prompt_id], []).append(prompt_id)
    for prompts in waiting.values():
        rng.shuffle(prompts)
    chosen: list[str] = []
    while waiting and len(chosen) < num_prompts:
        shares = bucket_probabilities(waiting.keys(), buckets)
        # Python's own choices, so that a seed means the same wherever numpy is newer.
        picks = rng.choices(list(shares), weights=list(shares.values()), k=num_prompts - len(chosen))
        for bucket in picks:
            if waiting.get(bucket):
                chosen.append(waiting[bucket].pop())
        waiting = {bucket: prompts for bucket, prompts in waiting.items() if prompts}
    return chosen


def buffer_metrics(memory: ReplayBuffer) -> Mapping[str, float]:
    """What the memory holds, as metrics."""
    return {
        "experience/prompts": float(len(memory.successes)),
        "experience/answers": float(sum(map(len, memory.successes.values()))),
        "experience/retired": float(len(memory.retired_epochs)),
    }


REPLAY = "replay"
"""In the sampling seeds of replayed prompts, in the place of the epoch."""


def check_single_guide_source(session: Session, *, other: str) -> None:
    """Stored successes and a guide cache cannot both own the slots of a batch."""
    if session.recipe.guide.experience.replay_fraction:
        raise NpoError(
            f"guide.experience.replay_fraction replays the run's own successes, and {other} fills the same slots",
            "one of them: set guide.experience.replay_fraction=0 when the run is made, or leave the guide out",
        )


def build_replay_batch(
    session: Session, memory: ReplayBuffer, *, seed_name: str, step: int, position: int
) -> BatchPlan:
    """floor(share B) replayed prompts, or as many as are stored, and the rest from the data order."""
    recipe = session.recipe
    wanted = recipe.train.prompts_per_step
    num_replayed = min(len(memory.successes), int(recipe.guide.experience.replay_fraction * wanted))
    fresh, behind = next_prompts(session, memory, position, count=wanted - num_replayed)
    names = sample_replay_prompts(
        memory,
        num_replayed,
        buckets=make_buckets(session),
        seed=derive_seed(recipe.train.seed, "experience", seed_name, step),
        exclude={prompt.prompt_id for _, prompt in fresh},
    )
    if len(names) < num_replayed:
        fresh, behind = next_prompts(session, memory, position, count=wanted - len(names), exclude=names)
    rule = make_injection_policy(session, seed_name=seed_name, step=step)
    parts = [
        PromptBatch(
            prompts=tuple(prompt for at, prompt in fresh if at == epoch),
            seed_label=(epoch,),
            guides=None,
            injection=rule,
        )
        for epoch in dict.fromkeys(epoch for epoch, _ in fresh)
    ]
    if names:
        parts.append(_replayed(session, memory, names, rule=rule))
    return BatchPlan(prompt_batches=tuple(parts), position=behind)


def make_buckets(session: Session) -> Buckets:
    """The recipe's preference among stored prompts."""
    settings = session.recipe.guide.experience
    size = session.recipe.train.group_size
    return Buckets(group_size=size, units=settings.bucket_units, sigma=settings.bucket_sigma)


def next_prompts(
    session: Session, memory: ReplayBuffer, position: int, *, count: int, exclude: Sequence[str] = ()
) -> tuple[list[tuple[int, Prompt]], int]:
    """The next `count` prompts with their epochs, those passed over that retired in an earlier one; and the cursor.

    Where fewer than a batch are left unretired, nobody is passed over: a batch is never short.
    """
    pool = session.task.train
    skip = len(pool) - len(memory.retired_epochs) >= session.recipe.train.prompts_per_step
    found: list[tuple[int, Prompt]] = []
    while len(found) < count:
        prompt, epoch = pool[session.order.indices(position, 1)[0]], session.order.epoch(position)
        position += 1
        gone = skip and memory.retired_epochs.get(prompt.prompt_id, epoch) < epoch
        if not gone and prompt.prompt_id not in exclude:
            found.append((epoch, prompt))
    return found, position


def _replayed(session: Session, memory: ReplayBuffer, names: Sequence[str], *, rule: InjectionPolicy) -> PromptBatch:
    """Every one of these groups gives a slot to the best of its stored answers."""
    known = {prompt.prompt_id: prompt for prompt in session.task.train}
    best = select_successes(session, {name: memory.successes[name] for name in names}, known, seed=rule.seed)
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
    return PromptBatch(
        prompts=tuple(known[name] for name in names), seed_label=(REPLAY,), guides=guides, injection=open_rule
    )


def select_successes(
    session: Session, stored: Mapping[str, Sequence[Success]], prompts: Mapping[str, Prompt], *, seed: int
) -> dict[str, Success]:
    """Of each prompt's answers that with the least entropy or NLL under the present policy, means over its tokens."""
    how = session.recipe.guide.experience.select
    if how == "random":
        return {name: each[derive_seed(seed, "stored", name) % len(each)] for name, each in stored.items()}
    several = [(name, success) for name, each in stored.items() if len(each) > 1 for success in each]
    rows = [_row(session, prompts[name], success.response_ids) for name, success in several]
    costs: dict[str, list[float]] = {}
    for (name, _), scores in zip(several, run_logprob_pass(session.policy, session.recipe, rows), strict=True):
        costs.setdefault(name, []).append(_cost(scores, how))
    return {name: each[_first_least(costs[name]) if name in costs else 0] for name, each in stored.items()}


def _cost(scores: ResponseLogprobs, how: str) -> float:
    return float(scores.entropies_T.mean()) if how == "entropy" else -float(scores.logps_T.mean())


def _first_least(costs: Sequence[float]) -> int:
    return min(range(len(costs)), key=costs.__getitem__)


def _row(session: Session, prompt: Prompt, response_ids: tuple[int, ...]) -> TokenRow:
    return session.policy.row(prompt, response_ids)


def update_buffer(
    session: Session, batch: StepBatch, memory: ReplayBuffer, *, sampler_step: int, position: int
) -> ReplayBuffer:
    """The memory after this batch. Asked before the update: log-probabilities are those of the weights that wrote."""
    settings = session.recipe.guide.experience
    rewards = [rollout.reward for group in batch.on_policy for rollout in group.rollouts]
    outcomes = [] if not memory.is_collecting else _outcomes(session, batch, before=sampler_step, position=position)
    memory = add_successes(memory, outcomes, retire=settings.retire_solved)
    return start_collecting(memory, sum(rewards) / len(rewards), start=settings.start_accuracy)


def _outcomes(session: Session, batch: StepBatch, *, before: int, position: int) -> list[GroupResult]:
    solved = [(group, _correct(group)) for group in batch.mixed]
    partly = [(group, right) for group, right in solved if 0 < len(right) < len(group.rollouts)]
    own = [(group, rollout) for group, right in partly for rollout in right if not rollout.is_off_policy]
    rows = [_row(session, group.prompt, rollout.response_ids) for group, rollout in own]
    fresh: dict[str, list[Success]] = {}
    for (group, rollout), scores in zip(own, run_logprob_pass(session.policy, session.recipe, rows), strict=True):
        logps = tuple(scores.logps_T.tolist())
        success = Success(response_ids=rollout.response_ids, behavior_logps=logps, text=rollout.text, step=before)
        fresh.setdefault(group.prompt.prompt_id, []).append(success)
    return [
        GroupResult(
            prompt_id=group.prompt.prompt_id,
            num_correct=len(right),
            group_size=len(group.rollouts),
            epoch=session.order.epoch(position),
            new_successes=tuple(fresh.get(group.prompt.prompt_id, ())),
        )
        for group, right in solved
    ]


def _correct(group: Group) -> list:
    return [rollout for rollout in group.rollouts if rollout.verdict == "correct"]
