"""The learner and the steps after it: which checkpoint, which branch, which prompts. Used by scoring and guides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npo_cli.config.loading import override_saved_recipe
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint, list_ancestry_checkpoints
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry, find_main_branch, refuse_scout
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.rollouts import Prompt

if TYPE_CHECKING:
    from npo_cli.session.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """The checkpoint that a guide is for, on the branch that has its later checkpoints."""

    recipe: Recipe
    branch: str
    checkpoint: Checkpoint | None
    """None: the base model of a run that begins."""

    @property
    def step(self) -> int:
        """The learner's step."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def find_learner(run: RunDir, *, at: int | None, branch: str | None, overrides: Sequence[str]) -> Learner:
    """The checkpoint at step `at`, or at the recipe's guide.replay.at_step."""
    branch = branch or find_main_branch(run)
    refuse_scout(run, branch, "is no learner: nothing is scored or sampled for it")
    recipe = override_saved_recipe(run.read_recipe(branch), overrides, path=run.recipe_path(branch), purpose="measure")
    step = recipe.guide.replay.at_step if at is None else at
    if step is None:
        raise NpoError(
            "the learner's step is missing: the recipe has no guide.replay.at_step",
            f"add --at STEP; steps are listed by: npo index {quote_path(run.root)}",
        )
    return Learner(recipe=recipe, branch=branch, checkpoint=find_checkpoint(run, branch, step))


def find_later_checkpoint(run: RunDir, learner: Learner, step: int) -> Checkpoint:
    """A later checkpoint on the learner's line of descent."""
    if step <= learner.step:
        raise NpoError(
            f"step {step} is not later than the learner's step {learner.step}",
            f"choose a later step (npo index {quote_path(run.root)}); as a control: --source earlier:{step}",
        )
    return find_checkpoint(run, learner.branch, step)


def list_later_checkpoints(run: RunDir, learner: Learner) -> list[Checkpoint]:
    """Every later checkpoint on the learner's line of descent, by step."""
    later = [
        checkpoint for checkpoint in list_ancestry_checkpoints(run, learner.branch) if checkpoint.step > learner.step
    ]
    if not later:
        raise NpoError(
            f"{learner.branch} has no checkpoint later than step {learner.step}",
            f"train further: npo resume {quote_path(run.root)} --branch {learner.branch} "
            f"train.num_steps={2 * learner.step or 1}",
        )
    return sorted(later, key=lambda checkpoint: checkpoint.step)


def find_data_position(run: RunDir, branch: str, step: int) -> int:
    """The data position after `step`, from the metrics of the branch that has that step."""
    if step == 0:
        return 0
    for span in ancestry(run, branch):
        if span.contains(step):
            for line in read_metrics(run, span.branch):
                if line["step"] == step and isinstance(line.get("data_position"), int):
                    return line["data_position"]
    raise NpoError(
        f"the metrics of {branch} have no data position for step {step}",
        f"choose another step; they are listed by: npo show {quote_path(run.root)} metrics",
    )


def list_replay_prompts(session: Session, learner: Learner, num_steps: int) -> list[Prompt]:
    """Distinct prompts visited in the `num_steps` steps after the learner, in order.

    With dynamic sampling a step may draw more than one batch: recorded positions are used as far as they go, then one
    batch per step.
    """
    first = find_data_position(session.run, learner.branch, learner.step)
    last = first + num_steps * learner.recipe.train.prompts_per_step
    if learner.recipe.sampling.dynamic:
        newest = list_later_checkpoints(session.run, learner)[-1].step
        known = min(learner.step + num_steps, newest)
        num_unknown = learner.step + num_steps - known
        last = (
            find_data_position(session.run, learner.branch, known) + num_unknown * learner.recipe.train.prompts_per_step
        )
    return session.prompts_between(first, last)
