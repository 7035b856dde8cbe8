"""`npo sample-guide`: sample a guide source on the prompts of a replay, verify, and keep responses in a guide cache.

Sampled are the prompts whose recorded group passed the gate: the others would seldom have a slot for a response.
They are sampled in rounds of `guide.cache.samples_per_round` until one response is correct or
`guide.cache.samples_per_prompt` were drawn, or too few are correct (`guide.cache.min_yield`). Stopping at the first
success leaves the distribution of the kept response, g(. | correct), unchanged and saves most of the tokens where the
guide is good. Interrupted at any time, it is resumed by the same command.
"""

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from npo_cli.config.guides import GuideCacheSettings
from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.candidates import choose_source
from npo_cli.guides.source import (
    GuideSource,
    PromptResponses,
    is_yield_low,
    open_source,
    sample_source,
)
from npo_cli.guides.sources.checkpoint import CheckpointSource
from npo_cli.seeds import derive_seed
from npo_cli.session.learner import list_replay_prompts
from npo_cli.session.recorded_steps import RecordedSteps
from npo_cli.session.session import open_task_and_policy
from npo_cli.session.startup import charge_startup
from npo_cli.storage.costs import CostKind, append_cost
from npo_cli.storage.guide_cache import finish_guide_cache, open_guide_cache, read_guide_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.lock import lock_run
from npo_cli.storage.sample_store import SampleStore
from npo_cli.storage.scouts import drop_used_scouts
from npo_cli.types.guides import GuideCacheInfo, SourceSpec
from npo_cli.types.rollouts import Notice, Progress, Prompt, PromptSamples, Rollout

CHUNK_PROMPTS = 64


def build_guide_cache(
    root: Path,
    *,
    spec: SourceSpec | None,
    at: int | None,
    name: str | None = None,
    branch: str | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[Progress | Notice | GuideCacheInfo]:
    """Fill the guide cache `name`, or finish it. `spec` None: the choice of the newest scoring of this learner."""
    run = open_run(root)
    source, name = choose_source(run, spec=spec, at=at, name=name, branch=branch, steps=steps, overrides=overrides)
    learner = source.target.learner
    if spec is None:
        yield Notice(message=f"guide source: {source.spec.text}")
    with (
        lock_run(run),
        open_task_and_policy(source.session_recipe(), learner.checkpoint, run=run) as (task, policy),
        open_source(source, task=task, policy=policy),
    ):
        if learner.recipe.guide.cache.lazy:
            yield from warning_notices(source.warnings())
            info = new_cache_info(source, name, num_prompts=0, is_lazy=True)
            folder = open_guide_cache(run, info).folder
            charge_startup(run, branch=info.branch, step=info.learner_step, artifact=folder)
            yield Notice(
                message=f"guide {name} is sampled while training: npo resume {quote_path(root)} --at "
                f"{learner.step} --guide {name}"
            )
            yield finish_guide_cache(run, info)
            return
        prompts = require_guide_prompts(source)
        if isinstance(source, CheckpointSource):
            source.reuse_recorded(prompts)
        early = source.warnings()
        yield from warning_notices(early)
        info = new_cache_info(source, name, num_prompts=len(prompts), max_accuracy=selection_gate(source))
        store = open_guide_cache(run, info)
        charge_startup(run, branch=info.branch, step=info.learner_step, artifact=store.folder)
        yield from fill_cache(source, info, store, prompts)
        yield from warning_notices(warning for warning in source.warnings() if warning not in early)
        done = finish_guide_cache(run, info, is_external=source.is_external)
        for scout in drop_used_scouts(run):
            yield Notice(message=f"scout {scout} was used: its checkpoints are dropped")
        if done.num_prompts < len(prompts):
            yield Notice(
                message=f"sampling ended after {done.num_prompts} of {len(prompts)} prompts: of the last responses "
                f"fewer than guide.cache.min_yield={learner.recipe.guide.cache.min_yield} were correct",
                level="warning",
            )
        yield done


def require_guide_prompts(source: GuideSource) -> list[Prompt]:
    """The prompts that the source is sampled for; refused where none needs a guide."""
    prompts, at = list_guide_prompts(source), source.target.learner.step
    if not prompts:
        raise NpoError(
            f"no prompt of steps {at + 1}-{at + source.num_steps} needs a guide: every recorded accuracy is above "
            f"guide.inject.max_accuracy={selection_gate(source)}",
            "choose another --at, or sample all prompts: guide.cache.prompts=all",
        )
    return prompts


def selection_gate(source: GuideSource) -> float | None:
    """guide.inject.max_accuracy where prompts are selected by their recorded accuracy; None where all are sampled.

    Responses of a source that are there already cost nothing: its prompts are never selected.
    """
    guide = source.target.learner.recipe.guide
    return guide.inject.max_accuracy if guide.cache.prompts == "failed" and source.is_fresh else None


def list_guide_prompts(source: GuideSource) -> list[Prompt]:
    """The prompts of the segment in which `source`, which is open, is used, without those that need no guide."""
    learner, gate = source.target.learner, selection_gate(source)
    prompts = list_replay_prompts(source.session, learner, source.num_steps)
    if gate is None or gate >= 1:
        return prompts
    recorded = RecordedSteps(run=source.target.run, branch=learner.branch)
    solved = recorded.find_solved_prompts(learner.step, learner.step + source.num_steps, gate)
    return [prompt for prompt in prompts if prompt.prompt_id not in solved]


def warning_notices(warnings: Iterable[str]) -> Iterator[Notice]:
    """Warnings of a source."""
    return (Notice(message=warning, level="warning") for warning in warnings)


def new_cache_info(
    source: GuideSource, name: str, *, num_prompts: int, max_accuracy: float | None = None, is_lazy: bool = False
) -> GuideCacheInfo:
    """What a cache is, before it has any response; `source` is open. `is_lazy`: a replay will fill it."""
    run, learner, session = source.target.run, source.target.learner, source.session
    return GuideCacheInfo(
        name=name,
        run_id=run.run_id,
        branch=learner.branch,
        learner_step=learner.step,
        source=source.spec,
        guide_step=source.guide_step,
        guide_digest=source.digest,
        num_steps=source.num_steps,
        tokenizer_digest=session.policy.tokenizer_digest,
        sampling=describe_sampling(learner.recipe.guide.cache),
        num_prompts=num_prompts,
        num_prompts_with_rollouts=0,
        num_samples=0,
        num_tokens=0,
        guide_training_tokens=source.guide_training_tokens,
        max_accuracy=max_accuracy,
        older_step=source.older_step,
        lazy_settings=learner.recipe.guide.cache.model_dump(mode="json") if is_lazy else {},
    )


def describe_sampling(settings: GuideCacheSettings) -> str:
    """How responses are sampled and selected, as part of a cache's identity: `8 by 1, random, yield 0.05`."""
    parts = [f"{settings.samples_per_prompt} by {settings.samples_per_round}", settings.select]
    if settings.temperature is not None:
        parts.append(f"temperature {settings.temperature}")
    if settings.max_responses_per_prompt > 1:
        parts.append(f"{settings.max_responses_per_prompt} per prompt")
    if settings.min_correct > 1:
        parts.append(f"at least {settings.min_correct} correct")
    if settings.keep == "all":
        parts.append("wrong ones too")
    if settings.min_yield > 0:
        parts.append(f"yield {settings.min_yield}")
    if settings.reuse_steps > 0:
        parts.append(f"recorded ones of {settings.reuse_steps} steps")
    return ", ".join(parts)


def fill_cache(
    source: GuideSource,
    info: GuideCacheInfo,
    store: SampleStore,
    prompts: Sequence[Prompt],
    *,
    cost_kind: CostKind = "guide_cache",
    done: dict[str, PromptSamples] | None = None,
    charges_seconds: bool = True,
) -> Iterator[Progress]:
    """Sample, verify and select, a chunk of prompts at a time; each chunk is written before the next is sampled.

    The chunk after which the yield is too low is the last: a cache without its later prompts. `done`, if given, holds
    what the store does, and is added to. Without `charges_seconds` the seconds are charged elsewhere.
    """
    done = read_guide_prompts(store.folder) if done is None else done
    settings = source.session.recipe.guide.cache
    label = info.source.name if info.guide_step is None else info.guide_step
    for start in range(0, len(prompts), CHUNK_PROMPTS):
        # An interrupted chunk is sampled again as a whole: the batch, and thus every number, is the same.
        batch = prompts[start : start + CHUNK_PROMPTS]
        if source.is_fresh and is_sampling_futile(done, prompts[:start], settings):
            break
        left = [prompt for prompt in batch if prompt.prompt_id not in done]
        if not left:
            continue
        num_solved = sum(bool(samples.rollouts) for samples in done.values())
        yield Progress(description="sample guide", done=start, total=len(prompts), note=f"{num_solved} solved")
        started = time.perf_counter()
        chunk = select_responses(source, sample_source(source, left), label=label)
        num_tokens = sum(samples.num_tokens for samples in chunk)
        append_cost(
            source.target.run,
            cost_kind,
            branch=info.branch,
            step=info.learner_step,
            artifact=store.folder,
            piece=chunk[0].prompt_id,
            tokens=num_tokens,
            forwards=num_tokens * source.forwards_per_token,
            seconds=time.perf_counter() - started if charges_seconds else 0.0,
        )
        store.append(info.source.text, chunk)
        done |= {samples.prompt_id: samples for samples in chunk}
    num_solved = sum(bool(samples.rollouts) for samples in done.values())
    yield Progress(description="sample guide", done=len(prompts), total=len(prompts), note=f"{num_solved} solved")


def is_sampling_futile(
    done: Mapping[str, PromptSamples], before: Sequence[Prompt], settings: GuideCacheSettings
) -> bool:
    """Whether too few responses to the last chunk of prompts were correct; never where wrong ones are kept as well."""
    chunk = [done[prompt.prompt_id] for prompt in before[-CHUNK_PROMPTS:]]
    counts = [(sum(one.num_sampled for one in chunk), sum(one.num_correct for one in chunk))]
    return settings.keep == "correct" and is_yield_low(counts, settings.min_yield)


def select_responses(
    source: GuideSource, responses: Sequence[PromptResponses], *, label: int | str
) -> list[PromptSamples]:
    """The first guide.cache.max_responses_per_prompt responses of each prompt by guide.cache.select, with log-probs."""
    limit = source.session.recipe.guide.cache.max_responses_per_prompt
    selected = [ranked[:limit] for ranked in rank_responses(source, responses, label=label)]
    pairs = [(entry.prompt, rollout) for entry, kept in zip(responses, selected, strict=True) for rollout in kept]
    logps = iter(source.logprobs(pairs))
    return [
        PromptSamples(
            prompt_id=entry.prompt.prompt_id,
            num_sampled=entry.num_sampled,
            num_correct=entry.num_correct,
            num_tokens=entry.num_tokens,
            rollouts=tuple(_make_guide_rollout(rollout, slot, next(logps)) for slot, rollout in enumerate(kept)),
            images=entry.prompt.images,
        )
        for entry, kept in zip(responses, selected, strict=True)
    ]


def _make_guide_rollout(rollout: Rollout, slot: int, logps_T: tuple[float, ...] | None) -> Rollout:
    """A response as it is cached and injected: off-policy as a whole, with the reward that its verifier gave."""
    return replace(
        rollout,
        slot=slot,
        behavior_logps=logps_T,
        source=rollout.source if rollout.is_off_policy else "guide",
        spans=(),
        mean_entropy=None,
        verdict=rollout.verdict or "unparseable",
        reward=0.0 if rollout.reward is None else rollout.reward,
    )


def rank_responses(
    source: GuideSource, responses: Sequence[PromptResponses], *, label: int | str
) -> list[list[Rollout]]:
    """For each prompt the responses that may be kept, best first; none if fewer than guide.cache.min_correct are right.

    `label` is part of the seed of the random choice: the guide's step, or the name of the source.
    """
    recipe = source.session.recipe
    settings = recipe.guide.cache
    eligible = [entry.correct_rollouts if entry.num_correct >= settings.min_correct else [] for entry in responses]
    if settings.keep == "all":
        eligible = [
            correct or entry.correct_rollouts or list(entry.rollouts)
            for correct, entry in zip(eligible, responses, strict=True)
        ]
    if settings.select == "random":
        return [
            _random_first(rollouts, seed=derive_seed(recipe.train.seed, "guide-choice", label, entry.prompt.prompt_id))
            for rollouts, entry in zip(eligible, responses, strict=True)
        ]
    if settings.select == "shortest":
        return [sorted(rollouts, key=lambda rollout: len(rollout.response_ids)) for rollouts in eligible]
    pairs = [
        (entry.prompt, rollout) for rollouts, entry in zip(eligible, responses, strict=True) for rollout in rollouts
    ]
    logprobs = iter(source.learner_logprob(pairs))
    scored = [[(next(logprobs), rollout) for rollout in rollouts] for rollouts in eligible]
    return [[rollout for _, rollout in sorted(each, key=lambda pair: -pair[0])] for each in scored]


def _random_first(rollouts: Sequence[Rollout], *, seed: int) -> list[Rollout]:
    """One at random, then the others in their order."""
    if not rollouts:
        return []
    first = random.Random(seed).choice(rollouts)
    return [first, *(rollout for rollout in rollouts if rollout is not first)]
