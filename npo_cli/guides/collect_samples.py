"""One scoring under way: who was asked what, and the asking, one after the other or adapters side by side."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from npo_cli.config.guides import ScoringSettings
from npo_cli.guides.source import compute_logprobs
from npo_cli.scoring.variance import SampleRatio
from npo_cli.session.learner import Learner
from npo_cli.session.policy_ratios import CandidateSample
from npo_cli.session.session import SamplingSpec, Session, sample_groups, sample_groups_per_version
from npo_cli.storage.checkpoints import Checkpoint
from npo_cli.storage.costs import append_cost
from npo_cli.storage.sample_store import SCREENING_INDEX, SampleStore
from npo_cli.types.rollouts import Group, Progress, Prompt

CHUNK_PROMPTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringState:
    """One scoring under way."""

    session: Session
    learner: Learner
    store: SampleStore
    samples: dict[tuple[int, str], list[CandidateSample]]
    """By (arm, prompt id): everything sampled so far, in this process or before."""
    ratios: dict[tuple[int, str], list[SampleRatio]] = field(default_factory=dict)

    @property
    def settings(self) -> ScoringSettings:
        """The recipe's score section."""
        return self.learner.recipe.scoring


def collect_samples(
    contest: ScoringState, checkpoint: Checkpoint, prompts: Sequence[Prompt], *, candidate: int | None = None
) -> Iterator[Progress]:
    """Sample a checkpoint k times on each prompt it was not asked before."""
    candidate = checkpoint.step if candidate is None else candidate
    session, total = contest.session, len(prompts)
    left = [prompt for prompt in prompts if (candidate, prompt.prompt_id) not in contest.samples]
    if left:
        session.policy.load(checkpoint.path)
    what = "probe the learner" if candidate == SCREENING_INDEX else f"ask step {candidate}"
    for start in range(0, len(left), CHUNK_PROMPTS):
        yield Progress(description=what, done=total - len(left) + start, total=total)
        label = ("score", contest.learner.branch, contest.learner.step, candidate)
        part = left[start : start + CHUNK_PROMPTS]
        started = time.perf_counter()
        groups = sample_groups(
            session,
            part,
            seed_label=label,
            slots=range(contest.settings.samples_per_prompt),
            sampler_step=checkpoint.step,
        )
        record_samples(contest, candidate, groups, started=started)
    yield Progress(description=what, done=total, total=total)


def record_samples(contest: ScoringState, arm: int, groups: Sequence[Group], *, started: float) -> None:
    """Write down what was sampled since `started`, with log-probabilities of the weights at hand, which sampled it."""
    flat = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    samples = [
        CandidateSample.from_rollout(arm, rollout, logps)
        for (_, rollout), logps in zip(flat, compute_logprobs(contest.session, flat), strict=True)
    ]
    if not samples:
        return
    charge_scoring(
        contest,
        piece=f"{arm}:{samples[0].prompt_id}",
        tokens=sum(len(sample.response_ids) for sample in samples),
        started=started,
    )
    contest.store.samples.extend([sample.to_row() for sample in samples])
    for sample in samples:
        contest.samples.setdefault((arm, sample.prompt_id), []).append(sample)


def charge_scoring(
    contest: ScoringState, *, piece: str, started: float, tokens: int = 0, forwards_per_token: int = 1
) -> None:
    """Charge what was done since `started` to the scoring. Before the samples are written: a chunk that is lost in
    between is sampled again and has the same piece."""
    append_cost(
        contest.session.run,
        "score",
        branch=contest.learner.branch,
        step=contest.learner.step,
        artifact=contest.store.folder,
        piece=piece,
        tokens=tokens,
        forwards=tokens * forwards_per_token,
        seconds=time.perf_counter() - started,
    )


def collect_all_samples(
    contest: ScoringState, checkpoints: Sequence[Checkpoint], prompts: Sequence[Prompt]
) -> Iterator[Progress]:
    """Sample every checkpoint: as many at once as the engine holds side by side, else one after the other."""
    places = contest.session.engine.num_versions
    for start in range(0, len(checkpoints), places):
        several = checkpoints[start : start + places]
        if len(several) > 1:
            yield from collect_samples_concurrently(contest, several, prompts)
        else:
            yield from collect_samples(contest, several[0], prompts)


def collect_samples_concurrently(
    contest: ScoringState, checkpoints: Sequence[Checkpoint], prompts: Sequence[Prompt]
) -> Iterator[Progress]:
    """Adapters of one base in common batches: each is put in step and proved, then all are asked a chunk of prompts."""
    session, learner, total = contest.session, contest.learner, len(prompts)
    steps = [checkpoint.step for checkpoint in checkpoints]
    left = [prompt for prompt in prompts if any((step, prompt.prompt_id) not in contest.samples for step in steps)]
    asked = []
    for checkpoint in checkpoints if left else ():
        session.policy.load(checkpoint.path)
        version = session.sync.sync_weights(checkpoint.step)
        label = ("score", learner.branch, learner.step, checkpoint.step)
        asked.append(SamplingSpec(seed_label=label, sampler_step=checkpoint.step, version=version))
    what = f"ask steps {steps[0]} to {steps[-1]} together"
    for start in range(0, len(left), CHUNK_PROMPTS):
        yield Progress(description=what, done=total - len(left) + start, total=total)
        part = left[start : start + CHUNK_PROMPTS]
        started = time.perf_counter()
        answers = sample_groups_per_version(session, part, asked, slots=range(contest.settings.samples_per_prompt))
        for checkpoint, groups in zip(checkpoints, answers, strict=True):
            session.policy.load(checkpoint.path)
            new = [group for group in groups if (checkpoint.step, group.prompt.prompt_id) not in contest.samples]
            record_samples(contest, checkpoint.step, new, started=started)
            started = time.perf_counter()
    yield Progress(description=what, done=total, total=total)
