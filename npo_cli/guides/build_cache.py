"""A guide cache being filled: ask an author, verify, choose, write; killed anywhere, it goes on."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from npo_cli.config.recipe import Recipe
from npo_cli.guides.source import GuideSource, PromptResponses
from npo_cli.seeds import derive_seed
from npo_cli.session.session import Session
from npo_cli.storage.costs import append_cost
from npo_cli.storage.guide_cache import GuideCacheWriter, QueriedPrompt
from npo_cli.types.guides import GuideCacheInfo, GuideRollout
from npo_cli.types.rollouts import Progress, Prompt, Rollout

CHUNK_PROMPTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBuild:
    """A guide cache being filled."""

    info: GuideCacheInfo
    store: GuideCacheWriter


def describe_sampling(recipe: Recipe) -> str:
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


def fill_cache(
    session: Session, cache: CacheBuild, prompts: Sequence[Prompt], *, source: GuideSource
) -> Iterator[Progress]:
    """Ask, verify and keep, a chunk of prompts at a time; each chunk is written before the next is drawn."""
    done = cache.store.read_queried_prompts().keys()
    num_found = len(cache.store.read_rollouts())
    for start in range(0, len(prompts), CHUNK_PROMPTS):
        # A chunk cut short is asked again whole: in the same company every figure comes out the same.
        chunk = prompts[start : start + CHUNK_PROMPTS]
        if all(prompt.prompt_id in done for prompt in chunk):
            continue
        yield Progress(description="sample guide", done=start, total=len(prompts), note=f"{num_found} answered")
        started = time.perf_counter()
        answers = source.sample(chunk)
        found = select_responses(session, answers, source=source, cache=cache)
        ledger = [_ledger_line(entry) for entry in answers]
        num_tokens = sum(line.num_tokens for line in ledger)
        append_cost(
            session.run,
            "guide_cache",
            branch=cache.info.branch,
            step=cache.info.learner_step,
            artifact=cache.store.folder,
            piece=chunk[0].prompt_id,
            tokens=num_tokens,
            forwards=num_tokens * source.forwards_per_token,
            seconds=time.perf_counter() - started,
        )
        for trajectory in found:
            cache.store.add_rollout(trajectory)
        num_found += len({trajectory.prompt_id for trajectory in found})
        for line in ledger:
            cache.store.add_queried_prompt(line)
    yield Progress(description="sample guide", done=len(prompts), total=len(prompts), note=f"{num_found} answered")


def _ledger_line(entry: PromptResponses) -> QueriedPrompt:
    return QueriedPrompt(
        prompt_id=entry.prompt.prompt_id,
        num_sampled=entry.num_sampled,
        num_correct=entry.num_correct,
        num_tokens=entry.num_tokens,
    )


def select_responses(
    session: Session, asked: Sequence[PromptResponses], *, source: GuideSource, cache: CacheBuild
) -> list[GuideRollout]:
    """The best answers of each prompt by guide.cache.select, up to max_responses_per_prompt, with their "
    "log-probabilities."""
    info = cache.info
    label = info.source if info.guide_step is None else info.guide_step
    ordered = rank_responses(session, asked, source=source, label=label)
    chosen = [
        (entry, number, rollout)
        for entry, rollouts in zip(asked, ordered, strict=True)
        for number, rollout in enumerate(rollouts[: session.recipe.guide.cache.max_responses_per_prompt])
    ]
    logps = source.logprobs([(entry.prompt, rollout) for entry, _, rollout in chosen])
    return [
        GuideRollout(
            prompt_id=entry.prompt.prompt_id,
            response_ids=rollout.response_ids,
            behavior_logps=logps_T,
            text=rollout.text,
            verdict=rollout.verdict or "unparseable",
            guide_step=rollout.sampler_step,
            num_sampled=entry.num_sampled,
            num_correct=entry.num_correct,
            source=rollout.source if rollout.is_off_policy else "guide",
            number=number,
            finished=rollout.finished,
            images=entry.prompt.images,
        )
        for (entry, number, rollout), logps_T in zip(chosen, logps, strict=True)
    ]


def rank_responses(
    session: Session, asked: Sequence[PromptResponses], *, source: GuideSource, label: int | str
) -> list[list[Rollout]]:
    """Of each prompt the answers that may be kept, the best first; none where too few were correct.

    `label` enters the seeds: the guide's step, or the kind of source.
    """
    settings = session.recipe.guide
    eligible = [entry.correct_rollouts if entry.num_correct >= settings.cache.min_correct else [] for entry in asked]
    if settings.cache.keep == "all":
        eligible = [
            right or entry.correct_rollouts or list(entry.rollouts)
            for right, entry in zip(eligible, asked, strict=True)
        ]
    if settings.cache.select == "random":
        seed = session.recipe.train.seed
        return [
            _shuffled(right, seed=derive_seed(seed, "guide-choice", label, entry.prompt.prompt_id))
            for right, entry in zip(eligible, asked, strict=True)
        ]
    if settings.cache.select == "shortest":
        return [sorted(right, key=lambda rollout: len(rollout.response_ids)) for right in eligible]
    pairs = [(entry.prompt, rollout) for right, entry in zip(eligible, asked, strict=True) for rollout in right]
    far = iter([-near for near in source.learner_logprob(pairs)])
    return [[rollout for _, rollout in sorted(_ranked(right, far), key=lambda pair: pair[0])] for right in eligible]


def _ranked(rollouts: Sequence[Rollout], keys: Iterator[float]) -> list[tuple[float, Rollout]]:
    return [(next(keys), rollout) for rollout in rollouts]


def _shuffled(rollouts: Sequence[Rollout], *, seed: int) -> list[Rollout]:
    """The first is a fair choice; the others follow it in their own order."""
    if not rollouts:
        return []
    first = random.Random(seed).choice(rollouts)
    return [first, *(rollout for rollout in rollouts if rollout is not first)]
