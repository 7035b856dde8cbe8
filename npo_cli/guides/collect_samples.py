"""Sampling for a scoring: the learner, checkpoints of its line and other guide sources, chunk by chunk.

Every chunk is on disk before the next is sampled, so that a killed scoring continues where it stopped.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from npo_cli.config.guides import ScoringSettings
from npo_cli.guides.source import GuideSource, open_source, read_or_compute_logprobs, sample_source
from npo_cli.guides.sources.checkpoint import LineCheckpoint
from npo_cli.scoring.variance import SampleRatio
from npo_cli.session.learner import Learner
from npo_cli.session.recorded_steps import RecordedSteps
from npo_cli.session.session import SamplingSpec, Session, sample_groups, sample_groups_per_version
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringState:
    """One scoring in progress."""

    session: Session
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


def sample_learner(state: ScoringState, prompts: Sequence[Prompt], *, candidate: str) -> Iterator[Progress]:
    """The learner's samples for screening, or as the control."""
    checkpoint = state.learner.checkpoint
    seed = SCREENING_SEED if candidate == SCREENING else checkpoint.step
    yield from _sample_checkpoint(state, candidate, checkpoint, prompts, seed=seed)


def sample_candidates(
    state: ScoringState, sources: Sequence[GuideSource], prompts: Sequence[Prompt]
) -> Iterator[Progress]:
    """Checkpoints of the line: as many at once as the engine holds versions, else one after the other."""
    checkpoints = [source for source in sources if isinstance(source, LineCheckpoint)]
    num_versions = state.session.engine.num_versions
    for start in range(0, len(checkpoints), num_versions):
        batch = checkpoints[start : start + num_versions]
        if len(batch) > 1:
            yield from _sample_concurrently(state, batch, prompts)
        else:
            (source,) = batch
            step = source.checkpoint.step
            yield from _sample_checkpoint(state, source.spec.text, source.checkpoint, prompts, seed=step)


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


def _sample_checkpoint(
    state: ScoringState, candidate: str, checkpoint: Checkpoint, prompts: Sequence[Prompt], *, seed: int
) -> Iterator[Progress]:
    """Sample a checkpoint k times on each prompt that it was not sampled on yet."""
    session, total = state.session, len(prompts)
    left = state.unsampled(candidate, prompts)
    if left:
        session.policy.load(checkpoint.path)
    for done, chunk in _chunks(left):
        yield Progress(description=describe_sampling(candidate), done=total - len(left) + done, total=total)
        started = time.perf_counter()
        groups = sample_groups(
            session,
            chunk,
            seed_label=("score", state.learner.branch, state.learner.step, seed),
            slots=range(state.settings.samples_per_prompt),
            sampler_step=checkpoint.step,
        )
        _record(state, candidate, groups, started=started)
    yield Progress(description=describe_sampling(candidate), done=total, total=total)


def _sample_concurrently(
    state: ScoringState, sources: Sequence[LineCheckpoint], prompts: Sequence[Prompt]
) -> Iterator[Progress]:
    """LoRA adapters of one base in common batches: all are synced and verified, then sampled chunk by chunk."""
    session, learner, total = state.session, state.learner, len(prompts)
    left = [prompt for prompt in prompts if any(state.unsampled(source.spec.text, [prompt]) for source in sources)]
    specs = []
    for source in sources if left else ():
        step = source.checkpoint.step
        session.policy.load(source.checkpoint.path)
        label = ("score", learner.branch, learner.step, step)
        specs.append(SamplingSpec(seed_label=label, sampler_step=step, version=session.sync.sync_weights(step)))
    description = f"sample {sources[0].spec.text} to {sources[-1].spec.text} together"
    for done, chunk in _chunks(left):
        yield Progress(description=description, done=total - len(left) + done, total=total)
        started = time.perf_counter()
        per_version = sample_groups_per_version(session, chunk, specs, slots=range(state.settings.samples_per_prompt))
        for source, groups in zip(sources, per_version, strict=True):
            session.policy.load(source.checkpoint.path)
            unsampled = {prompt.prompt_id for prompt in state.unsampled(source.spec.text, chunk)}
            new = [group for group in groups if group.prompt.prompt_id in unsampled]
            _record(state, source.spec.text, new, started=started)
            started = time.perf_counter()
    yield Progress(description=description, done=total, total=total)


def _record(state: ScoringState, candidate: str, groups: Sequence[Group], *, started: float) -> None:
    """Store samples of the loaded weights, with the log-probabilities of the trainer's forward pass."""
    if not groups:
        return
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    logps = iter(read_or_compute_logprobs(state.session, pairs))
    scored = [
        replace(group, rollouts=tuple(replace(rollout, behavior_logps=next(logps)) for rollout in group.rollouts))
        for group in groups
    ]
    tokens = sum(rollout.num_tokens for _, rollout in pairs)
    state.charge(piece=f"{candidate} {groups[0].prompt.prompt_id}", tokens=tokens, started=started)
    state.add(candidate, scored)
