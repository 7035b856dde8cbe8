"""The stretch of training after a step: which branch, which prompts, how long. Shared by scoring and guiding."""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.config import Recipe
from npo_cli.errors import NpoError, as_typed
from npo_cli.loading import in_force
from npo_cli.records import Prompt
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint, history
from npo_cli.run_dir.lineage import descent, newest_branch
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.steps import measured_steps
from npo_cli.stages.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerAt:
    """A learner, and the line of descent on which its futures lie."""

    recipe: Recipe
    branch: str
    checkpoint: Checkpoint

    @property
    def step(self) -> int:
        """Steps the learner has done."""
        return self.checkpoint.step


def find_learner(run: RunDir, *, at: int | None, branch: str | None, overrides: Sequence[str]) -> LearnerAt:
    """The checkpoint at `at`, or at the recipe's guide.replay.at_step."""
    branch = branch or newest_branch(run)
    recipe = in_force(run.recipe(branch), overrides, path=run.recipe_path(branch), fork=True)
    step = recipe.guide.replay.at_step if at is None else at
    if step is None:
        raise NpoError(
            "which step is the learner? the recipe has no guide.replay.at_step",
            f"add --at STEP, one of those in: npo index {as_typed(run.root)}",
        )
    return LearnerAt(recipe=recipe, branch=branch, checkpoint=find_checkpoint(run, branch, step))


def find_future(run: RunDir, learner: LearnerAt, step: int) -> Checkpoint:
    """A checkpoint of the same line, later than the learner."""
    if step <= learner.step:
        raise NpoError(
            f"step {step} is not later than the learner's step {learner.step}: it is no near future",
            f"choose a step above {learner.step}: npo index {as_typed(run.root)}",
        )
    return find_checkpoint(run, learner.branch, step)


def futures(run: RunDir, learner: LearnerAt) -> list[Checkpoint]:
    """Every later checkpoint on the learner's line, by step."""
    later = [checkpoint for checkpoint in history(run, learner.branch) if checkpoint.step > learner.step]
    if not later:
        raise NpoError(
            f"{learner.branch} has no checkpoint later than step {learner.step}",
            f"train on first: npo resume {as_typed(run.root)} --from {learner.branch} "
            f"train.num_steps={2 * learner.step or 1}",
        )
    return sorted(later, key=lambda checkpoint: checkpoint.step)


def position_at(run: RunDir, branch: str, step: int) -> int:
    """The data cursor after `step`, from the metrics of the branch that made that step."""
    if step == 0:
        return 0
    for name, first, last in descent(run, branch):
        if first < step and (last is None or step <= last):
            for line in measured_steps(run, name):
                if line["step"] == step and isinstance(line.get("data_position"), int):
                    return line["data_position"]
    raise NpoError(
        f"the metrics of {branch} do not say where in the data step {step} ended",
        f"choose another step, one of those in: npo show {as_typed(run.root)} metrics",
    )


def segment_prompts(world: World, learner: LearnerAt, num_steps: int) -> list[Prompt]:
    """Distinct prompts visited in the `num_steps` steps after the learner, in their order.

    With dynamic sampling a step may draw more than one batch: what is on record is used, and the data order
    goes on from there, one batch a step.
    """
    first = position_at(world.run, learner.branch, learner.step)
    last = first + num_steps * learner.recipe.train.prompts_per_step
    if learner.recipe.sampling.dynamic:
        newest = futures(world.run, learner)[-1].step
        known = min(learner.step + num_steps, newest)
        left = learner.step + num_steps - known
        last = position_at(world.run, learner.branch, known) + left * learner.recipe.train.prompts_per_step
    return world.prompts_between(first, last)
