"""`npo sample-guide`: ask a later checkpoint the prompts of a segment and keep one verified answer each.

Prompts are asked in rounds of `guide.round` samples until one is correct or `guide.k` were drawn. Stopping at
the first success keeps the law of the trajectory, g(. | correct), and saves most of the tokens where the guide
is good. Behaviour log-probabilities come from the trainer's forward pass under the guide's weights.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from npo_cli.config import Recipe
from npo_cli.errors import NpoError, as_typed
from npo_cli.policy.logprobs import TokenRow
from npo_cli.records import GuideInfo, GuideTrajectory, Notice, Progress, Prompt, Rollout
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.run_dir.guides import Asked, GuideStore, finish_guide, new_guide
from npo_cli.run_dir.lock import writing
from npo_cli.run_dir.paths import RunDir, open_run, valid_name
from npo_cli.run_dir.seconds import add_seconds
from npo_cli.seeds import derive_seed
from npo_cli.stages.row_scores import row_scores
from npo_cli.stages.segment import LearnerAt, find_future, find_learner, segment_prompts
from npo_cli.stages.world import World, answer, open_policy, open_task, open_world

CHUNK_PROMPTS = 64
Known = Mapping[str, Sequence[Rollout]]
"""Answers that the guide gave before, by prompt id: they count as its first samples, and cost nothing again."""
NOTHING_KNOWN: Known = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the guide said to one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def correct(self) -> list[Rollout]:
        """Verified-correct and ended by themselves."""
        return [rollout for rollout in self.rollouts if rollout.verdict == "correct" and rollout.finished]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Whose answers are kept, and for whom."""

    learner: Checkpoint
    guide: Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """A guide cache being filled."""

    info: GuideInfo
    store: GuideStore


def sample_run(
    root: Path,
    *,
    guide_step: int | None,
    at: int | None,
    name: str | None,
    branch: str | None,
    steps: int | None,
    overrides: Sequence[str],
    allow_code: bool,
) -> Iterator[Progress | Notice | GuideInfo]:
    """Fill the guide cache `name`; a cache that was left unfinished is gone on with."""
    run = open_run(root)
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    guide = choose_guide(run, learner, guide_step)
    name = valid_name(f"{learner.branch}-{learner.step}-by-{guide.step}" if name is None else name)
    with writing(run):
        task = open_task(learner.recipe, allow_code=allow_code)
        try:
            policy = open_policy(learner.recipe, task, guide)
            with closing(open_world(run, learner.recipe, task=task, policy=policy)) as world:
                num_steps = steps or learner.recipe.intervention.steps or guide.step - learner.step
                prompts = segment_prompts(world, learner, num_steps)
                info = _info(world, learner, guide, name=name, num_steps=num_steps, count=len(prompts))
                cache = Cache(info=info, store=new_guide(run, info))
                yield from fill(world, cache, prompts, pair=Pair(learner=learner.checkpoint, guide=guide))
                yield finish_guide(run, info)
        finally:
            task.close()


def choose_guide(run: RunDir, learner: LearnerAt, guide_step: int | None) -> Checkpoint:
    """The named step, or the recipe's intervention.guide."""
    step = learner.recipe.intervention.guide if guide_step is None else guide_step
    if step is None:
        raise NpoError(
            "which step is the guide? the recipe has no intervention.guide",
            f"add --guide STEP; the best is named by: npo score-checkpoints {as_typed(run.root)} --at {learner.step}",
        )
    return find_future(run, learner, step)


def _info(world: World, learner: LearnerAt, guide: Checkpoint, *, name: str, num_steps: int, count: int) -> GuideInfo:
    return GuideInfo(
        name=name,
        run_id=world.run.run_id,
        branch=learner.branch,
        at_step=learner.step,
        guide_step=guide.step,
        guide_digest=guide.digest,
        num_steps=num_steps,
        tokenizer_digest=world.policy.tokenizer_digest,
        sampling=sampling_law(world.recipe),
        num_prompts=count,
        num_found=0,
        num_samples=0,
        num_tokens=0,
    )


def sampling_law(recipe: Recipe) -> str:
    """How the answers were drawn: samples, rounds, choice, and a temperature of their own if there is one."""
    settings = recipe.guide
    heat = "" if settings.temperature is None else f", temperature {settings.temperature}"
    return f"{settings.k} by {settings.round}, {settings.select}{heat}"


def fill(
    world: World, cache: Cache, prompts: Sequence[Prompt], *, pair: Pair, known: Known = NOTHING_KNOWN
) -> Iterator[Progress]:
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
        answers = ask(world, chunk, step=cache.info.guide_step, known=known)
        found = kept(world, answers, pair)
        ledger = [_ledger_line(entry, num_known=len(known.get(entry.prompt.prompt_id, ()))) for entry in answers]
        # The time comes first: a chunk lost from here on is asked again, and has then cost twice.
        num_tokens = sum(line.num_tokens for line in ledger)
        add_seconds(cache.store.folder, time.perf_counter() - started, num_tokens=num_tokens)
        for trajectory in found:
            num_found += cache.store.add_trajectory(trajectory) == "written"
        for line in ledger:
            cache.store.add_asked(line)
    yield Progress(what="sample guide", done=len(prompts), total=len(prompts), note=f"{num_found} answered")


def ask(world: World, prompts: Sequence[Prompt], *, step: int, known: Known = NOTHING_KNOWN) -> list[Answers]:
    """Rounds of samples; a prompt that has a correct answer asks no more, unless the best of all k is wanted."""
    settings = world.recipe.guide
    any_will_do = settings.select == "random"
    asked = {
        prompt.prompt_id: Answers(prompt=prompt, rollouts=tuple(known.get(prompt.prompt_id, ()))) for prompt in prompts
    }
    while True:
        wanting = [
            entry
            for entry in asked.values()
            if len(entry.rollouts) < settings.k and not (any_will_do and entry.correct)
        ]
        if not wanting:
            return list(asked.values())
        # Those who have the fewest answers are asked together, so that a slot is never drawn twice.
        first = min(len(entry.rollouts) for entry in wanting)
        slots = range(first, min(first + (settings.round if any_will_do else settings.k), settings.k))
        now = [entry.prompt for entry in wanting if len(entry.rollouts) == first]
        for group in answer(
            world, now, label=("guide", step), slots=slots, sampler_step=step, temperature=settings.temperature
        ):
            before = asked[group.prompt.prompt_id]
            asked[group.prompt.prompt_id] = replace(before, rollouts=before.rollouts + group.rollouts)


def _ledger_line(entry: Answers, *, num_known: int) -> Asked:
    """Samples of both kinds; tokens of the new ones."""
    return Asked(
        prompt_id=entry.prompt.prompt_id,
        num_sampled=len(entry.rollouts),
        num_correct=len(entry.correct),
        num_tokens=sum(len(rollout.response_ids) for rollout in entry.rollouts[num_known:]),
    )


def kept(world: World, asked: Sequence[Answers], pair: Pair) -> list[GuideTrajectory]:
    """One correct answer a prompt, with log-probabilities from the trainer's pass under the guide's weights."""
    solved = [entry for entry in asked if entry.correct]
    chosen = SELECTORS[world.recipe.guide.select](world, solved, pair)
    pairs = [(entry.prompt, rollout) for entry, rollout in zip(solved, chosen, strict=True)]
    logps = forward_logps(world, pairs, temperature=world.recipe.guide.temperature)
    return [
        GuideTrajectory(
            prompt_id=entry.prompt.prompt_id,
            response_ids=rollout.response_ids,
            behavior_logps=logps_T,
            text=rollout.text,
            verdict="correct",
            guide_step=pair.guide.step,
            num_sampled=len(entry.rollouts),
            num_correct=len(entry.correct),
        )
        for entry, rollout, logps_T in zip(solved, chosen, logps, strict=True)
    ]


def forward_logps(
    world: World, pairs: Sequence[tuple[Prompt, Rollout]], *, temperature: float | None = None
) -> list[tuple[float, ...]]:
    """Per-token log-probabilities of responses under the weights at hand."""
    rows = [
        TokenRow(prompt_ids=world.policy.encode(prompt), response_ids=rollout.response_ids) for prompt, rollout in pairs
    ]
    scored = row_scores(world.policy, world.recipe, rows, temperature=temperature)
    return [tuple(scores.logps_T.tolist()) for scores in scored]


def _random(world: World, solved: Sequence[Answers], pair: Pair) -> list[Rollout]:
    seed, step = world.recipe.train.seed, pair.guide.step
    streams = [random.Random(derive_seed(seed, "guide-choice", step, entry.prompt.prompt_id)) for entry in solved]
    return [stream.choice(entry.correct) for stream, entry in zip(streams, solved, strict=True)]


def _shortest(world: World, solved: Sequence[Answers], pair: Pair) -> list[Rollout]:
    return [min(entry.correct, key=lambda rollout: len(rollout.response_ids)) for entry in solved]


def _nearest(world: World, solved: Sequence[Answers], pair: Pair) -> list[Rollout]:
    """Highest mean log-probability under the learner, whose weights are swapped in for a moment."""
    world.policy.load(pair.learner.path)
    best = []
    for entry in solved:
        logps = forward_logps(world, [(entry.prompt, rollout) for rollout in entry.correct])
        means = [sum(logps_T) / len(logps_T) for logps_T in logps]
        best.append(entry.correct[max(range(len(means)), key=means.__getitem__)])
    world.policy.load(pair.guide.path)
    return best


SELECTORS = {"random": _random, "shortest": _shortest, "nearest": _nearest}
"""Ways to choose among several correct answers (`guide.select`)."""
