"""Sampling for a scoring: the learner, checkpoints of its line and other guide sources, chunk by chunk.

A chunk is sampled, scored by its own policy, and written; when a checkpoint has all of its samples, the learner scores
them. Where a core is free, a thread with a second model samples the next chunks meanwhile: the same chunks in the same
order, and the passes over them are the same, so results do not depend on it. Chunks reach the disk in that order too: a
killed scoring continues where it stopped, and samples again what had not been written.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from npo_cli.config.guides import ScoringSettings
from npo_cli.guides.candidates import draw_settings
from npo_cli.guides.source import (
    GuideSource,
    open_source,
    read_or_compute_logprobs,
    responses_per_prompt,
    sample_in_rounds,
    sample_source,
)
from npo_cli.guides.sources.checkpoint import LineCheckpoint
from npo_cli.policy.model import Policy
from npo_cli.scoring.variance import SampleRatio, SignalFormula
from npo_cli.session.learner import Learner
from npo_cli.session.logprob_pass import compute_learner_ratios
from npo_cli.session.recorded_steps import RecordedSteps
from npo_cli.session.session import (
    SamplingSpec,
    Session,
    build_session,
    load_second_policy,
    sample_groups,
    sample_groups_per_version,
)
from npo_cli.session.startup import measure_startup
from npo_cli.storage.checkpoints import Checkpoint
from npo_cli.storage.costs import CostKind, append_cost
from npo_cli.storage.sample_store import SampleStore
from npo_cli.types.rollouts import Group, Progress, Prompt, Rollout

CHUNK_PROMPTS = 32
SCREENING = "screening"
"""Id of the learner's first samples, by which prompts are screened; no SPEC has this name."""
CONTROL = "self"
"""Id of the learner's second samples: the control, and the KL floor. It is the SPEC of the learner as a candidate."""
SCREENING_SEED = -1
"""Part of the seeds of the screening samples, where a checkpoint has its step."""


@dataclass(kw_only=True, slots=True)
class CheckpointLoader:
    """A policy that takes the weights of one checkpoint after the other; those that it holds are not loaded again."""

    policy: Policy
    _held: tuple[Checkpoint, int] | None = field(default=None, init=False)
    """The checkpoint, and the policy's count of changes then."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Have the checkpoint's weights in the policy."""
        if self._held != (checkpoint, self.policy.num_weight_changes):
            self.policy.load(checkpoint.path)
            self._held = checkpoint, self.policy.num_weight_changes


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerThread:
    """Samples with a model of its own while the scoring's policy scores earlier chunks."""

    session: Session
    weights: CheckpointLoader
    pool: ThreadPoolExecutor
    """Of one thread."""


@contextmanager
def open_sampler_thread(session: Session, learner: Learner) -> Iterator[SamplerThread | None]:
    """The thread, for the block; None where there is no core for it, or the engine has no use of one."""
    if not has_core_for_sampler(session):
        yield None
        return
    with measure_startup("load", "a second model for sampling"):
        second = load_second_policy(session, learner.checkpoint)
    # The scoring's policy tokenizes each prompt first; both models read its token ids.
    policy = replace(second, prompt_tokens=session.policy.prompt_tokens)
    with (
        closing(build_session(session.run, session.recipe, task=session.task, policy=policy)) as own,
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring sampler") as pool,
    ):
        try:
            yield SamplerThread(session=own, weights=CheckpointLoader(policy=policy), pool=pool)
        finally:
            pool.shutdown(cancel_futures=True)


def has_core_for_sampler(session: Session) -> bool:
    """Whether a thread can sample beside the policy's passes: on a CPU with more cores than torch's threads, from the
    trainer's own model."""
    num_cores = len(os.sched_getaffinity(0))
    return (
        not session.distributed.is_launched
        and not session.engine.needs_weight_sync
        and session.policy.device.type == "cpu"
        and num_cores > torch.get_num_threads()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledPart:
    """What a scoring samples from one checkpoint."""

    candidate: str
    checkpoint: Checkpoint
    prompts: Sequence[Prompt]
    seed: int
    """Part of the seeds: the checkpoint's step, or SCREENING_SEED."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringState:
    """One scoring in progress."""

    session: Session
    sampler: SamplerThread | None
    weights: CheckpointLoader
    """Of the session's policy."""
    learner: Learner
    store: SampleStore
    samples: dict[tuple[str, str], tuple[Rollout, ...]]
    """By (candidate, prompt id): everything sampled so far, by this process or an earlier one. behavior_logps are from
    the trainer's forward pass."""
    horizon: int
    """Last step of the segment ahead, whose prompts are screened."""
    recorded: RecordedSteps
    """What the run recorded of its steps, for the forecast."""
    ratios: dict[tuple[str, str], list[SampleRatio]] = field(default_factory=dict)
    cost_kind: CostKind = "score"

    @property
    def settings(self) -> ScoringSettings:
        """The recipe's scoring section."""
        return self.learner.recipe.scoring

    def unsampled(self, candidate: str, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts that the candidate has no samples of yet."""
        return [prompt for prompt in prompts if (candidate, prompt.prompt_id) not in self.samples]

    def add(self, candidate: str, groups: Sequence[Group], *, is_stored: bool = True) -> None:
        """Take in a chunk of samples, and write it to the store."""
        if is_stored:
            self.store.append(candidate, [group.samples for group in groups])
        self.samples.update({(candidate, group.prompt.prompt_id): group.rollouts for group in groups})

    def charge(self, *, piece: str, started: float, tokens: int = 0, forwards_per_token: int = 1) -> None:
        """Charge work since `started` to the scoring, before its samples are written: a chunk that is lost in between
        is sampled again and has the same piece."""
        append_cost(
            self.session.run,
            self.cost_kind,
            branch=self.learner.branch,
            step=self.learner.step,
            artifact=self.store.folder,
            piece=piece,
            tokens=tokens,
            forwards=tokens * forwards_per_token,
            seconds=time.perf_counter() - started,
        )


def describe_sampling(candidate: str) -> str:
    """What the samples of a candidate, or the learner's own, are for."""
    own = {SCREENING: "screen the prompts", CONTROL: "sample the learner again"}
    return own.get(candidate, f"sample {candidate}")


def describe_learner_part(state: ScoringState, candidate: str, prompts: Sequence[Prompt]) -> SampledPart:
    """The learner's samples for screening, or as the control."""
    checkpoint = state.learner.checkpoint
    seed = SCREENING_SEED if candidate == SCREENING else checkpoint.step
    return SampledPart(candidate=candidate, checkpoint=checkpoint, prompts=prompts, seed=seed)


def sample_candidates(
    state: ScoringState,
    sources: Sequence[GuideSource],
    prompts: Sequence[Prompt],
    *,
    control: Sequence[Prompt],
) -> Iterator[Progress]:
    """The control, and checkpoints of the line: as many at once as the engine holds versions, else in turn.

    Rounds of a prompt are drawn in turn: each candidate has other prompts left.
    """
    checkpoints = [source for source in sources if isinstance(source, LineCheckpoint)]
    own, num_versions = describe_learner_part(state, CONTROL, control), state.session.engine.num_versions
    if num_versions > 1 and len(checkpoints) > 1 and state.settings.samples_per_round is None:
        yield from sample_in_turn(state, [own])
        for start in range(0, len(checkpoints), num_versions):
            yield from _sample_concurrently(state, checkpoints[start : start + num_versions], prompts)
        return
    parts = [
        SampledPart(
            candidate=source.spec.text, checkpoint=source.checkpoint, prompts=prompts, seed=source.checkpoint.step
        )
        for source in checkpoints
        if source.spec.text != CONTROL  # the learner as a candidate has the control's samples
    ]
    yield from sample_in_turn(state, [own, *parts])


def sample_other_source(state: ScoringState, source: GuideSource, prompts: Sequence[Prompt]) -> Iterator[Progress]:
    """A source that is no checkpoint of the line. It has a session of its own: the scoring's engine is closed.

    Recorded responses are read again instead of stored.
    """
    candidate = source.spec.text
    left = state.unsampled(candidate, prompts)
    if not left:
        return
    state.session.policy.load(state.learner.checkpoint.path)
    with open_source(source, task=state.session.task, policy=state.session.policy):
        for done, chunk in _chunks(left):
            yield Progress(description=f"sample {candidate}", done=len(prompts) - len(left) + done, total=len(prompts))
            started = time.perf_counter()
            groups, num_tokens = _sample_source(source, chunk)
            if source.is_fresh:
                state.charge(
                    piece=f"{candidate} {chunk[0].prompt_id}",
                    tokens=num_tokens,
                    forwards_per_token=source.forwards_per_token,
                    started=started,
                )
            state.add(candidate, groups, is_stored=source.is_fresh)
    yield Progress(description=f"sample {candidate}", done=len(prompts), total=len(prompts))


def _sample_source(source: GuideSource, prompts: Sequence[Prompt]) -> tuple[list[Group], int]:
    """All responses with their log-probabilities, and the number of tokens that were generated."""
    responses = sample_source(source, prompts)
    pairs = [(each.prompt, rollout) for each in responses for rollout in (*each.rollouts, *each.duplicates)]
    logps = iter(source.logprobs(pairs))
    groups = [
        Group(
            prompt=each.prompt,
            rollouts=tuple(
                replace(rollout, behavior_logps=next(logps)) for rollout in (*each.rollouts, *each.duplicates)
            ),
        )
        for each in responses
    ]
    return groups, sum(each.num_tokens for each in responses)


def _chunks(prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[Prompt]]]:
    return ((start, prompts[start : start + CHUNK_PROMPTS]) for start in range(0, len(prompts), CHUNK_PROMPTS))


def sample_in_turn(state: ScoringState, parts: Sequence[SampledPart]) -> Iterator[Progress]:
    """Sample checkpoints on each prompt that they were not sampled on yet, at most k times; the learner scores each
    when it is complete."""
    left = [state.unsampled(part.candidate, part.prompts) for part in parts]
    chunks = [(part, chunk) for part, own in zip(parts, left, strict=True) for _, chunk in _chunks(own)]
    sampled = _sample_chunks(state, chunks)
    for part, own in zip(parts, left, strict=True):
        description, total = describe_sampling(part.candidate), len(part.prompts)
        for done, _ in _chunks(own):
            yield Progress(description=description, done=total - len(own) + done, total=total)
            started = time.perf_counter()
            groups = next(sampled)
            state.weights.load(part.checkpoint)
            _record(state, part.candidate, groups, started=started)
        yield Progress(description=description, done=total, total=total)
        if part.candidate != SCREENING:
            compute_ratios(state, part.candidate, part.prompts)


def _sample_chunks(
    state: ScoringState, chunks: Sequence[tuple[SampledPart, Sequence[Prompt]]]
) -> Iterator[list[Group]]:
    """The groups of each chunk, in order: each when it is requested, or ahead by the sampler thread."""
    sampler = state.sampler or state

    def sample(chunk: tuple[SampledPart, Sequence[Prompt]]) -> list[Group]:
        part, prompts = chunk
        sampler.weights.load(part.checkpoint)
        label = ("score", state.learner.branch, state.learner.step, part.seed)

        def draw(left: Sequence[Prompt], slots: Sequence[int]) -> list[Group]:
            return sample_groups(
                sampler.session, left, seed_label=label, slots=slots, sampler_step=part.checkpoint.step
            )

        if part.candidate == SCREENING:
            return draw(prompts, range(state.settings.samples_per_prompt))
        responses = sample_in_rounds(
            draw_settings(state.learner.recipe), prompts, lambda left, slots: responses_per_prompt(draw(left, slots))
        )
        return [Group(prompt=each.prompt, rollouts=each.rollouts) for each in responses]

    if state.sampler is None:
        return map(sample, chunks)
    return state.sampler.pool.map(partial(copy_context().run, sample), chunks)


def _sample_concurrently(
    state: ScoringState, sources: Sequence[LineCheckpoint], prompts: Sequence[Prompt]
) -> Iterator[Progress]:
    """LoRA adapters of one base in common batches: all are synced and verified, then sampled chunk by chunk."""
    session, learner, total = state.session, state.learner, len(prompts)
    left = [prompt for prompt in prompts if any(state.unsampled(source.spec.text, [prompt]) for source in sources)]
    specs = []
    for source in sources if left else ():
        step = source.checkpoint.step
        state.weights.load(source.checkpoint)
        label = ("score", learner.branch, learner.step, step)
        specs.append(SamplingSpec(seed_label=label, sampler_step=step, version=session.sync.sync_weights(step)))
    description = f"sample {sources[0].spec.text} to {sources[-1].spec.text} together"
    for done, chunk in _chunks(left):
        yield Progress(description=description, done=total - len(left) + done, total=total)
        started = time.perf_counter()
        per_version = sample_groups_per_version(session, chunk, specs, slots=range(state.settings.samples_per_prompt))
        for source, groups in zip(sources, per_version, strict=True):
            state.weights.load(source.checkpoint)
            unsampled = {prompt.prompt_id for prompt in state.unsampled(source.spec.text, chunk)}
            new = [group for group in groups if group.prompt.prompt_id in unsampled]
            _record(state, source.spec.text, new, started=started)
            started = time.perf_counter()
    yield Progress(description=description, done=total, total=total)


def _record(state: ScoringState, candidate: str, groups: Sequence[Group], *, started: float) -> None:
    """Store samples of the loaded weights, with the log-probabilities of the trainer's forward pass.

    Those of the screening, which nothing reads, stay the engine's.
    """
    if not groups:
        return
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    if candidate != SCREENING:
        logps = iter(read_or_compute_logprobs(state.session, pairs))
        groups = [
            replace(group, rollouts=tuple(replace(rollout, behavior_logps=next(logps)) for rollout in group.rollouts))
            for group in groups
        ]
    tokens = sum(rollout.num_tokens for _, rollout in pairs)
    state.charge(piece=f"{candidate} {groups[0].prompt.prompt_id}", tokens=tokens, started=started)
    state.add(candidate, groups)


def compute_ratios(state: ScoringState, candidate: str, prompts: Sequence[Prompt]) -> None:
    """The learner's importance ratios of the samples that have none yet; none at all if any sample lacks
    log-probabilities."""
    new = [prompt for prompt in prompts if (candidate, prompt.prompt_id) not in state.ratios]
    pairs = [(prompt, rollout) for prompt in new for rollout in state.samples.get((candidate, prompt.prompt_id), ())]
    if not pairs or any(rollout.behavior_logps is None for _, rollout in pairs):
        return
    started = time.perf_counter()
    state.weights.load(state.learner.checkpoint)
    for ratio in compute_learner_ratios(
        state.session.policy, state.session.recipe, pairs, cap=SignalFormula.of(state.learner.recipe).token_cap
    ):
        state.ratios.setdefault((candidate, ratio.prompt_id), []).append(ratio)
    state.charge(piece=f"{candidate} logprobs", started=started)
