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
from npo_cli.run_dir.files import sha256_of
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import PROBE
from npo_cli.run_dir.seconds import add_seconds
from npo_cli.stages.authors import Author
from npo_cli.stages.contest import CHUNK_PROMPTS, Contest
from npo_cli.stages.guide_plan import Ask, Plan, plan_of
from npo_cli.stages.guide_sources import open_source
from npo_cli.stages.outside_author import fitted, load_outside
from npo_cli.stages.pushes import pushes_of
from npo_cli.stages.ratios import JudgedSample
from npo_cli.stages.sample_guide import told
from npo_cli.stages.segment import LearnerAt
from npo_cli.tasks.prompts import Task

KINDS = ("past", "base", "extrapolated", "run", "model", "endpoint", "file")
GIVEN = frozenset({"past", "file"})
"""Sources that generate nothing: their samples are not fresh, and as many a prompt as there happen to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceArm:
    """One source that is no later checkpoint."""

    number: int
    plan: Plan
    digest: str
    """What tells it from another behind the same name, as far as that can be told without opening it."""

    @property
    def kind(self) -> str:
        return self.plan.ask.source

    @property
    def is_fresh(self) -> bool:
        """Whether it is asked, and not only read."""
        return self.kind not in GIVEN

    @property
    def name(self) -> str:
        """`past`, `model FOLDER`, `run OTHER:main step 120`."""
        return f"{self.kind} {self.plan.origin}".rstrip().partition(" of run ")[0]


def asked_for(text: str) -> list[Ask]:
    """`past`, `base`, `model=FOLDER`, `run=OTHER[:BRANCH]`, `file=TRACES`, `endpoint=NAME@http://...`.

    `extrapolated=SPACE:K:A` may be a grid, and is then several.
    """
    kind, _, what = text.partition("=")
    if kind not in KINDS:
        raise NpoError(f"--source {text}: there is no kind {kind!r} to compare", f"--source takes {', '.join(KINDS)}")
    if kind == "endpoint":
        name, _, address = what.partition("@")
        return [Ask(source=kind, origin=address or None, model=name or None)]
    if kind == "extrapolated":
        return [Ask(source=kind, origin=push.name) for push in pushes_of(what)]
    return [Ask(source=kind, origin=what or None)]


def source_arms(run: RunDir, learner: LearnerAt, asked: Sequence[Ask], *, num_steps: int) -> list[SourceArm]:
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
        plan = replace(plan_of(run, judged, ask, steps=num_steps), purpose="score")
        arms.append(SourceArm(number=PROBE - 1 - place, plan=plan, digest=_digest(plan)))
    return arms


def _digest(plan: Plan) -> str:
    """Of a file, of another run's checkpoint, of the weights in a folder; a hub id and an address are their names."""
    if plan.other:
        return plan.other.checkpoint.digest
    if plan.motion:
        return plan.motion.older.digest
    path = Path(plan.origin).expanduser()
    if plan.ask.source == "file":
        return sha256_of(path)
    if plan.ask.source != "model" or not path.is_dir():
        return ""
    files = sorted([*path.glob("*.safetensors"), *path.glob("tokenizer*")])
    lines = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def tried(arms: Sequence[SourceArm], task: Task, policy: Policy) -> Iterator[Notice]:
    """Open each for a moment, without its engine: whoever cannot be asked is told before anything is sampled."""
    for arm in arms:
        if arm.kind in ("model", "run"):
            fitted(arm.plan, load_outside(arm.plan), task)
            continue
        with closing(open_source(arm.plan, task=task, policy=policy)) as source:
            yield from told(source.remarks)


def collect_source(contest: Contest, arm: SourceArm, prompts: Sequence[Prompt], *, task: Task) -> Iterator[Progress]:
    """Samples of one source on each prompt it was not asked before; `contest.world` has the learner's weights."""
    left = [prompt for prompt in prompts if (arm.number, prompt.prompt_id) not in contest.samples]
    if not left:
        return
    with closing(open_source(arm.plan, task=task, policy=contest.world.policy)) as source:
        for start in range(0, len(left), CHUNK_PROMPTS):
            yield Progress(what=f"ask {arm.kind}", done=len(prompts) - len(left) + start, total=len(prompts))
            part = left[start : start + CHUNK_PROMPTS]
            started = time.perf_counter()
            samples, num_tokens = _judged(arm.number, source.author, part)
            if arm.is_fresh:
                add_seconds(contest.scoring.folder, time.perf_counter() - started, num_tokens=num_tokens)
                contest.scoring.samples.extend([sample.row() for sample in samples])
            for sample in samples:
                contest.samples.setdefault((arm.number, sample.prompt_id), []).append(sample)
    yield Progress(what=f"ask {arm.kind}", done=len(prompts), total=len(prompts))


def _judged(number: int, author: Author, prompts: Sequence[Prompt]) -> tuple[list[JudgedSample], int]:
    """Every answer with its log-probabilities, and the tokens that they had cost."""
    answers = author.ask(prompts)
    pairs = [(entry.prompt, rollout) for entry in answers for rollout in (*entry.rollouts, *entry.repeats)]
    samples = [
        JudgedSample.of_rollout(number, rollout, logps)
        for (_, rollout), logps in zip(pairs, author.logps(pairs), strict=True)
    ]
    return samples, sum(entry.num_tokens for entry in answers)
