"""A guide cache being filled: ask an author, verify, choose, write; killed anywhere, it goes on."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from npo_cli.config import Recipe
from npo_cli.guide_records import GuideInfo, GuideTrajectory
from npo_cli.records import Progress, Prompt, Rollout
from npo_cli.run_dir.guides import Asked, GuideStore
from npo_cli.run_dir.seconds import add_seconds
from npo_cli.seeds import derive_seed
from npo_cli.stages.authors import Answers, Author
from npo_cli.stages.world import World

CHUNK_PROMPTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """A guide cache being filled."""

    info: GuideInfo
    store: GuideStore


def sampling_law(recipe: Recipe) -> str:
    """How the answers were drawn and kept: samples, rounds, choice, and what differs from one correct answer each."""
    settings = recipe.guide
    heat = "" if settings.cache.temperature is None else f", temperature {settings.cache.temperature}"
    more = (
        "" if settings.cache.max_responses_per_prompt == 1 else f", {settings.cache.max_responses_per_prompt} a prompt"
    )
    least = "" if settings.cache.min_correct == 1 else f", at least {settings.cache.min_correct} correct"
    every = "" if settings.cache.keep == "correct" else ", wrong ones too"
    rounds = f"{settings.cache.samples_per_prompt} by {settings.cache.samples_per_round}"
    return f"{rounds}, {settings.cache.select}{heat}{more}{least}{every}"


def fill(world: World, cache: Cache, prompts: Sequence[Prompt], *, author: Author) -> Iterator[Progress]:
    """Ask, verify and keep, a chunk of prompts at a time; each chunk is written before the next is drawn."""
    done = cache.store.asked().keys()
    num_found = len(cache.store.trajectories())
    for start in range(0, len(prompts), CHUNK_PROMPTS):
        # A chunk cut short is asked again whole: in the same company every figure comes out the same.
        chunk = prompts[start : start + CHUNK_PROMPTS]
        if all(prompt.prompt_id in done for prompt in chunk):
            continue
        yield Progress(what="sample guide", done=start, total=len(prompts), note=f"{num_found} answered")
        started = time.perf_counter()
        answers = author.ask(chunk)
        found = kept(world, answers, author=author, cache=cache)
        ledger = [_ledger_line(entry) for entry in answers]
        # The time comes first: a chunk lost from here on is asked again, and has then cost twice.
        num_tokens = sum(line.num_tokens for line in ledger)
        add_seconds(cache.store.folder, time.perf_counter() - started, num_tokens=num_tokens)
        for trajectory in found:
            cache.store.add_trajectory(trajectory)
        num_found += len({trajectory.prompt_id for trajectory in found})
        for line in ledger:
            cache.store.add_asked(line)
    yield Progress(what="sample guide", done=len(prompts), total=len(prompts), note=f"{num_found} answered")


def _ledger_line(entry: Answers) -> Asked:
    return Asked(
        prompt_id=entry.prompt.prompt_id,
        num_sampled=entry.num_sampled,
        num_correct=entry.num_correct,
        num_tokens=entry.num_tokens,
    )


def kept(world: World, asked: Sequence[Answers], *, author: Author, cache: Cache) -> list[GuideTrajectory]:
    """The best answers of each prompt by guide.cache.select, up to max_responses_per_prompt, with their "
    "log-probabilities."""
    info = cache.info
    label = info.source if info.guide_step is None else info.guide_step
    ordered = in_order(world, asked, author=author, label=label)
    chosen = [
        (entry, number, rollout)
        for entry, rollouts in zip(asked, ordered, strict=True)
        for number, rollout in enumerate(rollouts[: world.recipe.guide.cache.max_responses_per_prompt])
    ]
    logps = author.logps([(entry.prompt, rollout) for entry, _, rollout in chosen])
    return [
        GuideTrajectory(
            prompt_id=entry.prompt.prompt_id,
            response_ids=rollout.response_ids,
            behavior_logps=logps_T,
            text=rollout.text,
            verdict=rollout.verdict or "unparseable",
            guide_step=rollout.sampler_step,
            num_sampled=entry.num_sampled,
            num_correct=entry.num_correct,
            source=rollout.source if rollout.foreign else "guide",
            number=number,
            finished=rollout.finished,
            images=entry.prompt.images,
        )
        for (entry, number, rollout), logps_T in zip(chosen, logps, strict=True)
    ]


def in_order(world: World, asked: Sequence[Answers], *, author: Author, label: int | str) -> list[list[Rollout]]:
    """Of each prompt the answers that may be kept, the best first; none where too few were correct.

    `label` enters the seeds: the guide's step, or the kind of source.
    """
    settings = world.recipe.guide
    eligible = [entry.correct if entry.num_correct >= settings.cache.min_correct else [] for entry in asked]
    if settings.cache.keep == "all":
        eligible = [
            right or entry.correct or list(entry.rollouts) for right, entry in zip(eligible, asked, strict=True)
        ]
    if settings.cache.select == "random":
        seed = world.recipe.train.seed
        return [
            _shuffled(right, seed=derive_seed(seed, "guide-choice", label, entry.prompt.prompt_id))
            for right, entry in zip(eligible, asked, strict=True)
        ]
    if settings.cache.select == "shortest":
        return [sorted(right, key=lambda rollout: len(rollout.response_ids)) for right in eligible]
    pairs = [(entry.prompt, rollout) for right, entry in zip(eligible, asked, strict=True) for rollout in right]
    far = iter([-near for near in author.nearness(pairs)])
    return [[rollout for _, rollout in sorted(_ranked(right, far), key=lambda pair: pair[0])] for right in eligible]


def _ranked(rollouts: Sequence[Rollout], keys: Iterator[float]) -> list[tuple[float, Rollout]]:
    return [(next(keys), rollout) for rollout in rollouts]


def _shuffled(rollouts: Sequence[Rollout], *, seed: int) -> list[Rollout]:
    """The first is a fair choice; the others follow it in their own order."""
    if not rollouts:
        return []
    first = random.Random(seed).choice(rollouts)
    return [first, *(rollout for rollout in rollouts if rollout is not first)]
