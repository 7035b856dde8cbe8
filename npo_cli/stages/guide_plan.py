"""What a guide cache is to be made of: who is asked, for whom, for how long a replay. Nothing heavy is open here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from npo_cli.engines.endpoint import checked_address
from npo_cli.errors import NpoError, as_typed
from npo_cli.guide_records import GuideInfo
from npo_cli.policy.model import Policy
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint, history
from npo_cli.run_dir.lineage import newest_branch
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.stages.ahead import Motion, motion_at
from npo_cli.stages.authors import Author
from npo_cli.stages.guide_cache import sampling_law
from npo_cli.stages.pushes import EXAMPLE, push_of
from npo_cli.stages.segment import LearnerAt, find_future
from npo_cli.stages.world import World, open_world
from npo_cli.tasks.prompts import Task
from npo_cli.tasks.traces import refuse_no_file

TAKES: Mapping[str, tuple[str, ...]] = {
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
EXAMPLES = {
    "extrapolated": f"--from {EXAMPLE}",
    "model": "--from FOLDER_OR_HUB_ID",
    "endpoint": "--from http://127.0.0.1:8000/v1 --model NAME",
    "file": "--from traces.jsonl",
    "run": "--from OTHER_RUN",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What the command line says of the source."""

    source: str = "checkpoint"
    guide_step: int | None = None
    origin: str | None = None
    """Folder, hub id, address, file, run, or SPACE:K:A, as the source has it."""
    model: str | None = None
    """Name of the model at an address."""

    @property
    def given(self) -> dict[str, object]:
        """The options that were given."""
        every = {"--guide": self.guide_step, "--from": self.origin, "--model": self.model}
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherRun:
    """A checkpoint of another run."""

    run: RunDir
    checkpoint: Checkpoint
    branch: str

    @property
    def origin(self) -> str:
        """`runs/seed:main step 120 of run 3f2a...`; how it is asked for stands before the ` step `."""
        return f"{self.run.root}:{self.branch} step {self.checkpoint.step} of run {self.run.run_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who is to be asked, for whom, and for how long a replay."""

    run: RunDir
    learner: LearnerAt
    ask: Ask
    num_steps: int
    guide: Checkpoint | None = None
    """Where the author is a checkpoint of this run."""
    other: OtherRun | None = None
    """Where it is one of another run."""
    motion: Motion | None = None
    """Where it is the learner pushed along its own motion."""
    purpose: str = "guide"
    """In the seeds: what is sampled to choose a source is not what is sampled to learn from it."""

    @property
    def default_name(self) -> str:
        """`main-20-by-100`, `main-0-by-base`."""
        who = self.ask.source if self.ask.source != "checkpoint" or self.guide is None else str(self.guide.step)
        return f"{self.learner.branch}-{self.learner.step}-by-{who}"

    @property
    def origin(self) -> str:
        """Where it comes from, as it is kept with the cache."""
        return self.other.origin if self.other else self.ask.origin or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSource:
    """An author at work, in a world that can grade what it says."""

    plan: Plan
    world: World
    author: Author
    digest: str
    tokenizer_digest: str
    """The learner's: kept token ids are its own."""
    origin: str = ""
    side_tokens: int = 0
    remarks: tuple[str, ...] = ()
    """What a person should know before it is asked."""

    def close(self) -> None:
        """End what was started for it."""
        self.world.close()

    def info(self, name: str, *, num_prompts: int) -> GuideInfo:
        """What the cache is, before anything is in it."""
        learner, guide = self.plan.learner, self.plan.guide
        return GuideInfo(
            name=name,
            run_id=self.plan.run.run_id,
            branch=learner.branch,
            at_step=learner.step,
            guide_step=None if guide is None else guide.step,
            guide_digest=self.digest,
            num_steps=self.plan.num_steps,
            tokenizer_digest=self.tokenizer_digest,
            sampling=sampling_law(learner.recipe),
            num_prompts=num_prompts,
            num_found=0,
            num_samples=0,
            num_tokens=0,
            source=self.plan.ask.source,
            origin=self.origin,
            side_tokens=self.side_tokens,
            older_step=None if self.plan.motion is None else self.plan.motion.older.step,
        )


def plan_of(run: RunDir, learner: LearnerAt, ask: Ask, *, steps: int | None) -> Plan:
    """The source named, checked as far as it can be without opening a model."""
    refuse_misplaced_options(ask)
    guide = chosen_guide(run, learner, ask)
    other = chosen_run(run, ask) if ask.source == "run" else None
    motion = chosen_motion(run, learner, ask) if ask.source == "extrapolated" else None
    if ask.source == "file":
        refuse_no_file(Path(ask.origin or "").expanduser())
    if ask.source == "endpoint":
        checked_address(ask.origin or "")
    if ask.source == "past" and learner.step == 0:
        raise NpoError("the learner at step 0 has no past to draw from", "choose a later learner with --at")
    ahead = guide.step - learner.step if guide is not None else 0
    rest = learner.recipe.train.num_steps - learner.step
    num_steps = steps or learner.recipe.guide.replay.num_steps or (ahead if ahead > 0 else rest)
    if num_steps < 1:
        raise NpoError(f"step {learner.step} is the run's last: how long is the replay?", "add --steps N")
    return Plan(run=run, learner=learner, ask=ask, num_steps=num_steps, guide=guide, other=other, motion=motion)


def refuse_misplaced_options(ask: Ask) -> None:
    """Every source takes what says who it is, and nothing else."""
    if ask.source not in TAKES:
        raise NpoError(f"there is no source {ask.source!r}", f"--source takes {', '.join(TAKES)}")
    takes = TAKES[ask.source]
    for option in ask.given:
        if option not in takes:
            raise NpoError(
                f"{option} means nothing to --source {ask.source}",
                f"leave it out, or name one of: --source {', '.join(name for name in TAKES if option in TAKES[name])}",
            )
    for option in takes:
        if option != "--guide" and option not in ask.given:
            raise NpoError(f"--source {ask.source} needs {option}", f"--source {ask.source} {EXAMPLES[ask.source]}")


def chosen_guide(run: RunDir, learner: LearnerAt, ask: Ask) -> Checkpoint | None:
    """The named step, or the recipe's guide.replay.guide_step; the learner; step 0; nobody of this run."""
    if ask.source == "self":
        return learner.checkpoint
    if ask.source == "base":
        return find_checkpoint(run, learner.branch, 0)
    if ask.source != "checkpoint":
        return None
    step = learner.recipe.guide.replay.guide_step if ask.guide_step is None else ask.guide_step
    if step is None:
        raise NpoError(
            "which step is the guide? the recipe has no guide.replay.guide_step",
            f"add --guide STEP; the best is named by: npo score-checkpoints {as_typed(run.root)} --at {learner.step}",
        )
    return find_future(run, learner, step)


def chosen_motion(run: RunDir, learner: LearnerAt, ask: Ask) -> Motion:
    """SPACE:K:A, with the older copy that lies so far behind the learner."""
    push, recipe = push_of(ask.origin or ""), learner.recipe
    found = motion_at(run, learner.branch, push, step=learner.step, every=recipe.train.save_every)
    if found is None:
        raise NpoError(
            f"step {learner.step} has no older copy {push.k} steps back",
            "choose a later learner with --at, or a smaller k",
        )
    return found


def chosen_run(run: RunDir, ask: Ask) -> OtherRun:
    """`RUN` or `RUN:BRANCH`; the newest branch and its newest checkpoint where none is named."""
    text = ask.origin or ""
    root, _, branch = (text, "", "") if Path(text).exists() else text.rpartition(":")
    other = open_run(Path(root or text))
    if other.run_id == run.run_id:
        raise NpoError(
            f"{text} is this run itself",
            f"its own checkpoints are asked with: npo sample-guide {as_typed(run.root)} --guide STEP",
        )
    branch = branch or newest_branch(other)
    if ask.guide_step is not None:
        return OtherRun(run=other, checkpoint=find_checkpoint(other, branch, ask.guide_step), branch=branch)
    every = history(other, branch)
    if not every:
        raise NpoError(f"{root or text} has no complete checkpoint on {branch}", f"npo index {as_typed(other.root)}")
    return OtherRun(run=other, checkpoint=every[-1], branch=branch)


def quiet_world(plan: Plan, task: Task, policy: Policy) -> World:
    """A world in which the learner is not asked anything: no engine is started for it."""
    recipe = plan.learner.recipe
    quiet = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"kind": "transformers"})})
    return open_world(plan.run, quiet, task=task, policy=policy)
