"""One scoring under way: who was asked what, and the asking, one after the other or adapters side by side."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from npo_cli.config import ScoringSettings
from npo_cli.guide.signal import SampleRatio
from npo_cli.records import Group, Progress, Prompt
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.run_dir.scores import PROBE, Scoring
from npo_cli.run_dir.seconds import add_seconds
from npo_cli.stages.authors import forward_logps
from npo_cli.stages.ratios import JudgedSample
from npo_cli.stages.segment import LearnerAt
from npo_cli.stages.world import Asked, World, answer, answer_side_by_side

CHUNK_PROMPTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """One scoring under way."""

    world: World
    learner: LearnerAt
    scoring: Scoring
    samples: dict[tuple[int, str], list[JudgedSample]]
    """By (arm, prompt id): everything sampled so far, in this process or before."""
    ratios: dict[tuple[int, str], list[SampleRatio]] = field(default_factory=dict)

    @property
    def settings(self) -> ScoringSettings:
        """The recipe's score section."""
        return self.learner.recipe.scoring


def collect(
    contest: Contest, checkpoint: Checkpoint, prompts: Sequence[Prompt], *, arm: int | None = None
) -> Iterator[Progress]:
    """Sample a checkpoint k times on each prompt it was not asked before."""
    arm = checkpoint.step if arm is None else arm
    world, total = contest.world, len(prompts)
    left = [prompt for prompt in prompts if (arm, prompt.prompt_id) not in contest.samples]
    if left:
        world.policy.load(checkpoint.path)
    what = "probe the learner" if arm == PROBE else f"ask step {arm}"
    for start in range(0, len(left), CHUNK_PROMPTS):
        yield Progress(what=what, done=total - len(left) + start, total=total)
        label = ("score", contest.learner.branch, contest.learner.step, arm)
        part = left[start : start + CHUNK_PROMPTS]
        started = time.perf_counter()
        groups = answer(
            world, part, label=label, slots=range(contest.settings.samples_per_prompt), sampler_step=checkpoint.step
        )
        keep(contest, arm, groups, started=started)
    yield Progress(what=what, done=total, total=total)


def keep(contest: Contest, arm: int, groups: Sequence[Group], *, started: float) -> None:
    """Write down what was sampled since `started`, with log-probabilities of the weights at hand, which sampled it."""
    flat = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    samples = [
        JudgedSample.of_rollout(arm, rollout, logps)
        for (_, rollout), logps in zip(flat, forward_logps(contest.world, flat), strict=True)
    ]
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    add_seconds(contest.scoring.folder, time.perf_counter() - started, num_tokens=num_tokens)
    contest.scoring.samples.extend([sample.row() for sample in samples])
    for sample in samples:
        contest.samples.setdefault((arm, sample.prompt_id), []).append(sample)


def collect_all(contest: Contest, checkpoints: Sequence[Checkpoint], prompts: Sequence[Prompt]) -> Iterator[Progress]:
    """Sample every checkpoint: as many at once as the engine holds side by side, else one after the other."""
    places = contest.world.engine.num_versions
    for start in range(0, len(checkpoints), places):
        several = checkpoints[start : start + places]
        if len(several) > 1:
            yield from collect_side_by_side(contest, several, prompts)
        else:
            yield from collect(contest, several[0], prompts)


def collect_side_by_side(
    contest: Contest, checkpoints: Sequence[Checkpoint], prompts: Sequence[Prompt]
) -> Iterator[Progress]:
    """Adapters of one base in common batches: each is put in step and proved, then all are asked a chunk of prompts."""
    world, learner, total = contest.world, contest.learner, len(prompts)
    steps = [checkpoint.step for checkpoint in checkpoints]
    left = [prompt for prompt in prompts if any((step, prompt.prompt_id) not in contest.samples for step in steps)]
    asked = []
    for checkpoint in checkpoints if left else ():
        world.policy.load(checkpoint.path)
        version = world.sync.in_step(checkpoint.step)
        label = ("score", learner.branch, learner.step, checkpoint.step)
        asked.append(Asked(label=label, sampler_step=checkpoint.step, version=version))
    what = f"ask steps {steps[0]} to {steps[-1]} together"
    for start in range(0, len(left), CHUNK_PROMPTS):
        yield Progress(what=what, done=total - len(left) + start, total=total)
        part = left[start : start + CHUNK_PROMPTS]
        started = time.perf_counter()
        answers = answer_side_by_side(world, part, asked, slots=range(contest.settings.samples_per_prompt))
        for checkpoint, groups in zip(checkpoints, answers, strict=True):
            world.policy.load(checkpoint.path)
            new = [group for group in groups if (checkpoint.step, group.prompt.prompt_id) not in contest.samples]
            keep(contest, checkpoint.step, new, started=started)
            started = time.perf_counter()
    yield Progress(what=what, done=total, total=total)
