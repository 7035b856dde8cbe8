"""Sources as arms of a comparison: `KIND=WHAT` to who is asked, and the samples that each of them is judged by.

Checkpoints of the line are arms of `score_checkpoints`, by their step; every other source has a number below PROBE.
What is sampled is kept in the scoring's journal like a checkpoint's samples; a file and the past are read again.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from npo_cli.errors import NpoError
from npo_cli.policy.model import Policy
from npo_cli.records import Notice, Progress, Prompt
from npo_cli.run_dir.files import hash_file
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import SCREENING_INDEX
from npo_cli.run_dir.seconds import append_sampling_time
from npo_cli.stages.authors import GuideSource
from npo_cli.stages.contest import CHUNK_PROMPTS, ScoringState
from npo_cli.stages.guide_plan import SourceSpec, ResolvedSource, resolve_source
from npo_cli.stages.guide_sources import open_source
from npo_cli.stages.outside_author import fit_recipe_to_model, load_external_model
from npo_cli.stages.pushes import parse_extrapolation_grid
from npo_cli.stages.ratios import CandidateSample
from npo_cli.stages.sample_guide import build_warnings
from npo_cli.stages.segment import Learner
from npo_cli.tasks.prompts import Task

SCORED_SOURCE_KINDS = ("past", "base", "extrapolated", "run", "model", "endpoint", "file")
RECORDED_SOURCE_KINDS = frozenset({"past", "file"})
"""Sources that generate nothing: their samples are not fresh, and as many a prompt as there happen to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCandidate:
    """One source that is no later checkpoint."""

    number: int
    resolved: ResolvedSource
    digest: str
    """What tells it from another behind the same name, as far as that can be told without opening it."""

    @property
    def kind(self) -> str:
        return self.resolved.spec.kind

    @property
    def is_fresh(self) -> bool:
        """Whether it is asked, and not only read."""
        return self.kind not in RECORDED_SOURCE_KINDS

    @property
    def name(self) -> str:
        """`past`, `model FOLDER`, `run OTHER:main step 120`."""
        return f"{self.kind} {self.resolved.origin}".rstrip().partition(" of run ")[0]


def parse_source_specs(text: str) -> list[SourceSpec]:
    """`past`, `base`, `model=FOLDER`, `run=OTHER[:BRANCH]`, `file=TRACES`, `endpoint=NAME@http://...`.

    `extrapolated=SPACE:K:A` may be a grid, and is then several.
    """
    kind, _, what = text.partition("=")
    if kind not in SCORED_SOURCE_KINDS:
        raise NpoError(f"--source {text}: there is no kind {kind!r} to compare", f"--source takes {', '.join(SCORED_SOURCE_KINDS)}")
    if kind == "endpoint":
        name, _, address = what.partition("@")
        return [SourceSpec(kind=kind, origin=address or None, model=name or None)]
    if kind == "extrapolated":
        return [SourceSpec(kind=kind, origin=push.name) for push in parse_extrapolation_grid(what)]
    return [SourceSpec(kind=kind, origin=what or None)]


def resolve_source_candidates(run: RunDir, learner: Learner, asked: Sequence[SourceSpec], *, num_steps: int) -> list[SourceCandidate]:
    """Each source once, in the order given, asked for `scoring.samples_per_prompt` answers a prompt at once."""
    recipe = learner.recipe
    k = recipe.scoring.samples_per_prompt
    every = {
        **{"samples_per_prompt": k, "samples_per_round": k, "temperature": None, "select": "random"},
        **{"max_responses_per_prompt": 1, "min_correct": 1},
    }
    guide = recipe.guide.model_copy(update={"cache": recipe.guide.cache.model_copy(update=every)})
    judged = replace(learner, recipe=recipe.model_copy(update={"guide": guide}))
    arms = []
    for place, ask in enumerate(dict.fromkeys(asked)):
        plan = replace(resolve_source(run, judged, ask, steps=num_steps), purpose="score")
        arms.append(SourceCandidate(number=SCREENING_INDEX - 1 - place, resolved=plan, digest=_source_digest(plan)))
    return arms


def _source_digest(plan: ResolvedSource) -> str:
    """Of a file, of another run's checkpoint, of the weights in a folder; a hub id and an address are their names."""
    if plan.other_run:
        return plan.other_run.checkpoint.digest
    if plan.extrapolation:
        return plan.extrapolation.older_checkpoint.digest
    path = Path(plan.origin).expanduser()
    if plan.spec.kind == "file":
        return hash_file(path)
    if plan.spec.kind != "model" or not path.is_dir():
        return ""
    files = sorted([*path.glob("*.safetensors"), *path.glob("tokenizer*")])
    lines = "".join(f"{hash_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_sources(arms: Sequence[SourceCandidate], task: Task, policy: Policy) -> Iterator[Notice]:
    """Open each for a moment, without its engine: whoever cannot be asked is told before anything is sampled."""
    for arm in arms:
        if arm.kind in ("model", "run"):
            fit_recipe_to_model(arm.resolved, load_external_model(arm.resolved), task)
            continue
        with closing(open_source(arm.resolved, task=task, policy=policy)) as source:
            yield from build_warnings(source.warnings)


def collect_source_samples(contest: ScoringState, arm: SourceCandidate, prompts: Sequence[Prompt], *, task: Task) -> Iterator[Progress]:
    """Samples of one source on each prompt it was not asked before; `contest.world` has the learner's weights."""
    left = [prompt for prompt in prompts if (arm.number, prompt.prompt_id) not in contest.samples]
    if not left:
        return
    with closing(open_source(arm.resolved, task=task, policy=contest.session.policy)) as source:
        for start in range(0, len(left), CHUNK_PROMPTS):
            yield Progress(description=f"ask {arm.kind}", done=len(prompts) - len(left) + start, total=len(prompts))
            part = left[start : start + CHUNK_PROMPTS]
            started = time.perf_counter()
            samples, num_tokens = _sample_candidate(arm.number, source.source, part)
            if arm.is_fresh:
                append_sampling_time(contest.store.folder, time.perf_counter() - started, num_tokens=num_tokens)
                contest.store.samples.extend([sample.to_row() for sample in samples])
            for sample in samples:
                contest.samples.setdefault((arm.number, sample.prompt_id), []).append(sample)
    yield Progress(description=f"ask {arm.kind}", done=len(prompts), total=len(prompts))


def _sample_candidate(number: int, author: GuideSource, prompts: Sequence[Prompt]) -> tuple[list[CandidateSample], int]:
    """Every answer with its log-probabilities, and the tokens that they had cost."""
    answers = author.sample(prompts)
    pairs = [(entry.prompt, rollout) for entry in answers for rollout in (*entry.rollouts, *entry.duplicates)]
    samples = [
        CandidateSample.from_rollout(number, rollout, logps)
        for (_, rollout), logps in zip(pairs, author.logprobs(pairs), strict=True)
    ]
    return samples, sum(entry.num_tokens for entry in answers)
