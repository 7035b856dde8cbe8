"""What a guide cache is to be made of: who is asked, for whom, for how long a replay. Nothing heavy is open here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.extrapolation.sampler import ResolvedExtrapolation, find_extrapolation
from npo_cli.extrapolation.spec import EXAMPLE, parse_extrapolation
from npo_cli.guides.build_cache import describe_sampling
from npo_cli.guides.source import GuideSource
from npo_cli.inference.openai_client import validate_url
from npo_cli.policy.model import Policy
from npo_cli.session.learner import Learner, find_later_checkpoint
from npo_cli.session.session import Session, build_session
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint, list_ancestry_checkpoints
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_newest_branch
from npo_cli.tasks.task import Task
from npo_cli.tasks.traces import validate_trace_path
from npo_cli.types.guides import GuideCacheInfo

SOURCE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "checkpoint": ("--guide",),
    "self": (),
    "base": (),
    "extrapolated": ("--from",),
    "model": ("--from",),
    "endpoint": ("--from", "--model"),
    "file": ("--from",),
    "past": (),
    "run": ("--from", "--guide"),
}
"""Options that say who is asked, by source; of these only --guide may be left out."""
SOURCE_EXAMPLES = {
    "extrapolated": f"--from {EXAMPLE}",
    "model": "--from FOLDER_OR_HUB_ID",
    "endpoint": "--from http://127.0.0.1:8000/v1 --model NAME",
    "file": "--from traces.jsonl",
    "run": "--from OTHER_RUN",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """What the command line says of the source."""

    kind: str = "checkpoint"
    guide_step: int | None = None
    origin: str | None = None
    """Folder, hub id, address, file, run, or SPACE:K:A, as the source has it."""
    model: str | None = None
    """Name of the model at an address."""

    @property
    def given_options(self) -> dict[str, object]:
        """The options that were given."""
        every = {"--guide": self.guide_step, "--from": self.origin, "--model": self.model}
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherRunCheckpoint:
    """A checkpoint of another run."""

    run: RunDir
    checkpoint: Checkpoint
    branch: str

    @property
    def origin(self) -> str:
        """`runs/seed:main step 120 of run 3f2a...`; how it is asked for stands before the ` step `."""
        return f"{self.run.root}:{self.branch} step {self.checkpoint.step} of run {self.run.run_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSource:
    """Who is to be asked, for whom, and for how long a replay."""

    run: RunDir
    learner: Learner
    spec: SourceSpec
    num_steps: int
    guide: Checkpoint | None = None
    """Where the author is a checkpoint of this run."""
    other_run: OtherRunCheckpoint | None = None
    """Where it is one of another run."""
    extrapolation: ResolvedExtrapolation | None = None
    """Where it is the learner pushed along its own motion."""
    purpose: str = "guide"
    """In the seeds: what is sampled to choose a source is not what is sampled to learn from it."""

    @property
    def default_name(self) -> str:
        """`main-20-by-100`, `main-0-by-base`."""
        who = self.spec.kind if self.spec.kind != "checkpoint" or self.guide is None else str(self.guide.step)
        return f"{self.learner.branch}-{self.learner.step}-by-{who}"

    @property
    def origin(self) -> str:
        """Where it comes from, as it is kept with the cache."""
        return self.other_run.origin if self.other_run else self.spec.origin or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceHandle:
    """An author at work, in a world that can grade what it says."""

    resolved: ResolvedSource
    session: Session
    source: GuideSource
    digest: str
    tokenizer_digest: str
    """The learner's: kept token ids are its own."""
    origin: str = ""
    guide_training_tokens: int = 0
    warnings: tuple[str, ...] = ()
    """What a person should know before it is asked."""

    def close(self) -> None:
        """End what was started for it."""
        self.session.close()

    def info(self, name: str, *, num_prompts: int) -> GuideCacheInfo:
        """What the cache is, before anything is in it."""
        learner, guide = self.resolved.learner, self.resolved.guide
        return GuideCacheInfo(
            name=name,
            run_id=self.resolved.run.run_id,
            branch=learner.branch,
            learner_step=learner.step,
            guide_step=None if guide is None else guide.step,
            guide_digest=self.digest,
            num_steps=self.resolved.num_steps,
            tokenizer_digest=self.tokenizer_digest,
            sampling=describe_sampling(learner.recipe),
            num_prompts=num_prompts,
            num_prompts_with_rollouts=0,
            num_samples=0,
            num_tokens=0,
            source=self.resolved.spec.kind,
            origin=self.origin,
            guide_training_tokens=self.guide_training_tokens,
            older_step=None
            if self.resolved.extrapolation is None
            else self.resolved.extrapolation.older_checkpoint.step,
        )


def resolve_source(run: RunDir, learner: Learner, ask: SourceSpec, *, steps: int | None) -> ResolvedSource:
    """The source named, checked as far as it can be without opening a model."""
    validate_source_options(ask)
    guide = resolve_guide_checkpoint(run, learner, ask)
    other = resolve_other_run(run, ask) if ask.kind == "run" else None
    motion = resolve_extrapolation(run, learner, ask) if ask.kind == "extrapolated" else None
    if ask.kind == "file":
        validate_trace_path(Path(ask.origin or "").expanduser())
    if ask.kind == "endpoint":
        validate_url(ask.origin or "")
    if ask.kind == "past" and learner.step == 0:
        raise NpoError("the learner at step 0 has no past to draw from", "choose a later learner with --at")
    ahead = guide.step - learner.step if guide is not None else 0
    rest = learner.recipe.train.num_steps - learner.step
    num_steps = steps or learner.recipe.guide.replay.num_steps or (ahead if ahead > 0 else rest)
    if num_steps < 1:
        raise NpoError(f"step {learner.step} is the run's last: how long is the replay?", "add --steps N")
    return ResolvedSource(
        run=run, learner=learner, spec=ask, num_steps=num_steps, guide=guide, other_run=other, extrapolation=motion
    )


def validate_source_options(ask: SourceSpec) -> None:
    """Every source takes what says who it is, and nothing else."""
    if ask.kind not in SOURCE_OPTIONS:
        raise NpoError(f"there is no source {ask.kind!r}", f"--source takes {', '.join(SOURCE_OPTIONS)}")
    takes = SOURCE_OPTIONS[ask.kind]
    for option in ask.given_options:
        if option not in takes:
            raise NpoError(
                f"{option} means nothing to --source {ask.kind}",
                f"leave it out, or name one of: --source {', '.join(name for name in SOURCE_OPTIONS if option in SOURCE_OPTIONS[name])}",  # noqa: E501
            )
    for option in takes:
        if option != "--guide" and option not in ask.given_options:
            raise NpoError(f"--source {ask.kind} needs {option}", f"--source {ask.kind} {SOURCE_EXAMPLES[ask.kind]}")


def resolve_guide_checkpoint(run: RunDir, learner: Learner, ask: SourceSpec) -> Checkpoint | None:
    """The named step, or the recipe's guide.replay.guide_step; the learner; step 0; nobody of this run."""
    if ask.kind == "self":
        return learner.checkpoint
    if ask.kind == "base":
        return find_checkpoint(run, learner.branch, 0)
    if ask.kind != "checkpoint":
        return None
    step = learner.recipe.guide.replay.guide_step if ask.guide_step is None else ask.guide_step
    if step is None:
        raise NpoError(
            "which step is the guide? the recipe has no guide.replay.guide_step",
            f"add --guide STEP; the best is named by: npo score-checkpoints {quote_path(run.root)} --at {learner.step}",
        )
    return find_later_checkpoint(run, learner, step)


def resolve_extrapolation(run: RunDir, learner: Learner, ask: SourceSpec) -> ResolvedExtrapolation:
    """SPACE:K:A, with the older copy that lies so far behind the learner."""
    push, recipe = parse_extrapolation(ask.origin or ""), learner.recipe
    found = find_extrapolation(run, learner.branch, push, step=learner.step, every=recipe.train.save_every)
    if found is None:
        raise NpoError(
            f"step {learner.step} has no older copy {push.k} steps back",
            "choose a later learner with --at, or a smaller k",
        )
    return found


def resolve_other_run(run: RunDir, ask: SourceSpec) -> OtherRunCheckpoint:
    """`RUN` or `RUN:BRANCH`; the newest branch and its newest checkpoint where none is named."""
    text = ask.origin or ""
    root, _, branch = (text, "", "") if Path(text).exists() else text.rpartition(":")
    other = open_run(Path(root or text))
    if other.run_id == run.run_id:
        raise NpoError(
            f"{text} is this run itself",
            f"its own checkpoints are asked with: npo sample-guide {quote_path(run.root)} --guide STEP",
        )
    branch = branch or find_newest_branch(other)
    if ask.guide_step is not None:
        return OtherRunCheckpoint(run=other, checkpoint=find_checkpoint(other, branch, ask.guide_step), branch=branch)
    every = list_ancestry_checkpoints(other, branch)
    if not every:
        raise NpoError(f"{root or text} has no complete checkpoint on {branch}", f"npo index {quote_path(other.root)}")
    return OtherRunCheckpoint(run=other, checkpoint=every[-1], branch=branch)


def open_session_without_engine(plan: ResolvedSource, task: Task, policy: Policy) -> Session:
    """A world in which the learner is not asked anything: no engine is started for it."""
    recipe = plan.learner.recipe
    quiet = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"kind": "transformers"})})
    return build_session(plan.run, quiet, task=task, policy=policy)
