"""Who is asked for a guide cache: `--source` to an author, with where its answers come from.

| source | who | behaviour log-probabilities |
|---|---|---|
| checkpoint | a later step of the learner's line | its forward pass |
| self, base | the learner itself, step 0: controls (is it the future, or only more samples?) | its forward pass |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from npo_cli.errors import NpoError, as_typed
from npo_cli.guide_records import GuideInfo
from npo_cli.policy.model import Policy
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.authors import Author
from npo_cli.stages.checkpoint_author import CheckpointAuthor
from npo_cli.stages.guide_cache import sampling_law
from npo_cli.stages.segment import LearnerAt, find_future
from npo_cli.stages.world import World, load_checkpoint, open_world
from npo_cli.tasks.prompts import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What the command line says of the source."""

    source: str = "checkpoint"
    guide_step: int | None = None
    origin: str | None = None
    """Folder, hub id, address, file or run, as the source has it."""
    model: str | None = None
    """Name of the model at an address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who is to be asked, for whom, and for how long a replay; nothing heavy is open yet."""

    run: RunDir
    learner: LearnerAt
    ask: Ask
    num_steps: int
    guide: Checkpoint | None = None
    """Where the author is a checkpoint of this run."""

    @property
    def default_name(self) -> str:
        """`main-20-by-100`, `main-0-by-base`."""
        who = self.ask.source if self.ask.source != "checkpoint" or self.guide is None else str(self.guide.step)
        return f"{self.learner.branch}-{self.learner.step}-by-{who}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSource:
    """An author at work, in a world that can grade what it says."""

    plan: Plan
    world: World
    author: Author
    digest: str
    origin: str = ""
    tokenizer_digest: str
    """The learner's: kept token ids are its own."""

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
        )


def plan_of(run: RunDir, learner: LearnerAt, ask: Ask, *, steps: int | None) -> Plan:
    """The source named, checked as far as it can be without opening a model."""
    if ask.source not in SOURCES:
        raise NpoError(f"there is no source {ask.source!r}", f"--source takes {', '.join(SOURCES)}")
    guide = chosen_guide(run, learner, ask)
    ahead = guide.step - learner.step if guide is not None else 0
    rest = learner.recipe.train.num_steps - learner.step
    num_steps = steps or learner.recipe.intervention.steps or (ahead if ahead > 0 else rest)
    if num_steps < 1:
        raise NpoError(f"step {learner.step} is the run's last: how long is the replay?", "add --steps N")
    return Plan(run=run, learner=learner, ask=ask, num_steps=num_steps, guide=guide)


def chosen_guide(run: RunDir, learner: LearnerAt, ask: Ask) -> Checkpoint | None:
    """The named step, or the recipe's intervention.guide; the learner; step 0; nobody of this run."""
    if ask.source == "self":
        return learner.checkpoint
    if ask.source == "base":
        return find_checkpoint(run, learner.branch, 0)
    step = learner.recipe.intervention.guide if ask.guide_step is None else ask.guide_step
    if step is None:
        raise NpoError(
            "which step is the guide? the recipe has no intervention.guide",
            f"add --guide STEP; the best is named by: npo score-checkpoints {as_typed(run.root)} --at {learner.step}",
        )
    return find_future(run, learner, step)


def open_source(plan: Plan, *, task: Task, policy: Policy) -> OpenSource:
    """The author, ready to be asked; `policy` is the learner's."""
    return SOURCES[plan.ask.source](plan, task, policy)


def open_checkpoint(plan: Plan, task: Task, policy: Policy) -> OpenSource:
    """The guide's weights in the learner's place."""
    assert plan.guide is not None
    load_checkpoint(policy, plan.guide)
    world = open_world(plan.run, plan.learner.recipe, task=task, policy=policy)
    author = CheckpointAuthor(world=world, learner=plan.learner.checkpoint, guide=plan.guide)
    return OpenSource(
        plan=plan,
        world=world,
        author=author,
        digest=plan.guide.digest,
        tokenizer_digest=policy.tokenizer_digest,
    )


SOURCES: Mapping[str, Callable[[Plan, Task, Policy], OpenSource]] = {
    "checkpoint": open_checkpoint,
    "self": open_checkpoint,
    "base": open_checkpoint,
}
"""`--source` to what opens it."""
