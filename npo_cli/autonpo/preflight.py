"""Before training starts: settings with which AutoNPO can trigger, roll back and make progress, and where it begins."""

from collections.abc import Sequence
from typing import Any

from npo_cli.autonpo.rollback_choice import BIDIRECTIONAL_KINDS
from npo_cli.autonpo.rungs import find_undo
from npo_cli.config.autonpo import EARLY_RUNG
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.registry import RUNGS
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, find_main_branch, refuse_scout
from npo_cli.training.start_point import ResumePoint, find_resume_point, fork
from npo_cli.types.autonpo import AutoNPOState


def usable_distances(recipe: Recipe) -> tuple[int, ...]:
    """Rollback distances that end at a checkpoint: multiples of train.save_every."""
    return tuple(distance for distance in recipe.autonpo.rollback.distances if distance % recipe.train.save_every == 0)


def max_failed_prompts(recipe: Recipe, *, num_prompts: int) -> int:
    """Maximum number of distinct prompts that a replay of the largest usable distance visits."""
    longest = min(usable_distances(recipe)[-1], recipe.train.num_steps)
    return min(recipe.autonpo.pool.max_size, num_prompts, longest * recipe.train.prompts_per_step)


def validate_autonpo_settings(recipe: Recipe, num_prompts: int) -> None:
    """Refuse settings that could never work, naming the key and a value that would."""
    if recipe.has_target:
        raise NpoError(
            f"target.kind={recipe.target.kind} is not available with AutoNPO, whose rollbacks use guide caches",
            "target.kind=none, or fork by hand: npo resume RUN --at STEP --no-guide",
        )
    if recipe.train.objective != "rl":
        raise NpoError(
            f"train.objective={recipe.train.objective} is not available with AutoNPO, which reads rewards of rollouts",
            "train.objective=rl",
        )
    validate_distances(recipe)
    validate_trigger(recipe)
    validate_pool_and_probe(recipe)
    validate_cooldown(recipe)
    validate_early(recipe)
    validate_ladder(recipe)
    most = max_failed_prompts(recipe, num_prompts=num_prompts)
    for key, wanted in (
        ("autonpo.probe.num_prompts", recipe.autonpo.probe.num_prompts),
        ("autonpo.rollback.min_failed_prompts", recipe.autonpo.rollback.min_failed_prompts),
    ):
        if wanted > most:
            raise NpoError(
                f"{key} is {wanted}, but at most {most} prompts can have failed within the largest distance "
                f"(autonpo.pool.max_size {recipe.autonpo.pool.max_size}, {num_prompts} training prompts, "
                f"{recipe.train.prompts_per_step} per step)",
                f"{key}={most} or less",
            )


def validate_distances(recipe: Recipe) -> None:
    """A rollback needs a full checkpoint at its distance, and enough steps before it."""
    auto, train, usable = recipe.autonpo, recipe.train, usable_distances(recipe)
    if not usable:
        raise NpoError(
            f"none of autonpo.rollback.distances ({', '.join(map(str, auto.rollback.distances))}) is a multiple of "
            f"train.save_every ({train.save_every}): there is no checkpoint to roll back to",
            f"autonpo.rollback.distances=[{train.save_every},{2 * train.save_every}], or a smaller train.save_every",
        )
    # The newest checkpoint is the guide itself; the rollback target comes in addition.
    needed = usable[-1] // train.save_every + 1
    if train.keep_full_checkpoints is not None and train.keep_full_checkpoints < needed:
        raise NpoError(
            f"train.keep_full_checkpoints is {train.keep_full_checkpoints}: a rollback by {usable[-1]} steps "
            "(autonpo.rollback.distances) needs "
            f"{needed} full checkpoints {train.save_every} steps apart, including the newest",
            f"train.keep_full_checkpoints={needed}, or smaller autonpo.rollback.distances",
        )
    if usable[0] >= train.num_steps:
        raise NpoError(
            f"autonpo.rollback.distances begin at {usable[0]}, and the run has only {train.num_steps} steps "
            "(train.num_steps)",
            "smaller autonpo.rollback.distances and train.save_every, or more train.num_steps",
        )


def validate_trigger(recipe: Recipe) -> None:
    """Warm-up, window and patience must leave a step at which a warning can occur."""
    auto, num_steps = recipe.autonpo, recipe.train.num_steps
    if auto.max_interventions == 0:
        return
    first = max(auto.trigger.warmup_steps, auto.trigger.window) + auto.trigger.patience
    if first > num_steps:
        parts = {
            "autonpo.trigger.warmup_steps": auto.trigger.warmup_steps,
            "autonpo.trigger.window": auto.trigger.window,
            "autonpo.trigger.patience": auto.trigger.patience,
        }
        key = max(parts, key=lambda name: parts[name])
        rest = (
            max(auto.trigger.warmup_steps, auto.trigger.window)
            if key == "autonpo.trigger.patience"
            else auto.trigger.patience
        )
        raise NpoError(
            f"{key} is {parts[key]}: the earliest warning is at step {first} (the larger of "
            f"autonpo.trigger.warmup_steps {auto.trigger.warmup_steps} and "
            f"autonpo.trigger.window {auto.trigger.window}, plus autonpo.trigger.patience {auto.trigger.patience}), "
            f"and the run has only {num_steps} steps (train.num_steps)",
            f"{key}={max(1, num_steps - rest)} or less",
        )


def validate_pool_and_probe(recipe: Recipe) -> None:
    """Guides must be injectable, a probe must be passable, and V must be computable from the chosen samples."""
    autonpo, inject = recipe.autonpo, recipe.guide.inject
    if autonpo.pool.max_accuracy > inject.max_accuracy:
        raise NpoError(
            f"autonpo.pool.max_accuracy is {autonpo.pool.max_accuracy:g}, above guide.inject.max_accuracy "
            f"{inject.max_accuracy:g}: "
            "a guide for such a prompt would never be injected",
            f"autonpo.pool.max_accuracy={inject.max_accuracy:g} or less",
        )
    if (autonpo.probe.min_quality or 0.0) >= 1:
        raise NpoError(
            "autonpo.probe.min_quality is 1: the lower bound of a pass rate never reaches 1",
            "autonpo.probe.min_quality=0.1",
        )
    if autonpo.rollback.data == "onward":
        raise NpoError(
            "autonpo.rollback.data is onward: AutoNPO's guides are for the prompts of the replayed segment, "
            "and such a replay does not visit them",
            "autonpo.rollback.data=same",
        )
    if autonpo.probe.variance_samples == "learner" and recipe.scoring.variance not in BIDIRECTIONAL_KINDS:
        raise NpoError(
            f"autonpo.probe.variance_samples is learner, but scoring.variance={recipe.scoring.variance} can only be "
            "estimated from the guide's samples",
            f"scoring.variance={BIDIRECTIONAL_KINDS[-1]}, or autonpo.probe.variance_samples=guide",
        )


def validate_cooldown(recipe: Recipe) -> None:
    """Without a limit, a cooldown shorter than a replay would let the run repeat the same steps for ever."""
    auto, longest = recipe.autonpo, usable_distances(recipe)[-1]
    if auto.max_interventions == -1 and auto.trigger.cooldown_steps < longest:
        raise NpoError(
            f"autonpo.trigger.cooldown_steps is {auto.trigger.cooldown_steps}, shorter than the longest replay "
            f"({longest}, autonpo.rollback.distances), and "
            "autonpo.max_interventions sets no limit: the run could repeat the same steps for ever",
            f"autonpo.trigger.cooldown_steps={longest}, or a limit such as autonpo.max_interventions=3",
        )


def validate_ladder(recipe: Recipe) -> None:
    """Every rung could be applied, and there are steps to measure it on."""
    auto = recipe.autonpo
    if auto.is_published:
        return
    if auto.trigger.cooldown_steps == 0:
        raise NpoError(
            "autonpo.trigger.cooldown_steps is 0: the effect of a rung of autonpo.ladder is measured in its cooldown",
            f"autonpo.trigger.cooldown_steps={auto.trigger.window}",
        )
    for name in auto.ladder:
        RUNGS.get(name).check(recipe)


def validate_early(recipe: Recipe) -> None:
    """The run as a scout needs a checkpoint at its end, and at the end of the replay if the two are compared; a
    disposable one a run that is longer than its window."""
    early, train = recipe.autonpo.early, recipe.train
    if not early.enabled:
        return
    if early.scout == "disposable":
        RUNGS.get(EARLY_RUNG).check(recipe, is_early=True)
        if early.replay_steps > train.num_steps:
            raise NpoError(
                f"autonpo.early.replay_steps is {early.replay_steps}, and the run has only {train.num_steps} steps "
                "(train.num_steps)",
                f"autonpo.early.replay_steps={train.num_steps} or less",
            )
        return
    if early.scout_steps >= train.num_steps:
        raise NpoError(
            f"autonpo.early.scout_steps is {early.scout_steps}, and the run has only {train.num_steps} steps "
            "(train.num_steps): the bootstrap would never happen",
            f"autonpo.early.scout_steps={(train.num_steps - 1) // train.save_every * train.save_every} or less",
        )
    if early.replay_steps > early.scout_steps:
        raise NpoError(
            f"autonpo.early.replay_steps is {early.replay_steps}, longer than the scout that makes its guides "
            f"(autonpo.early.scout_steps {early.scout_steps})",
            f"autonpo.early.replay_steps={early.scout_steps} or less",
        )
    if early.scout_steps % train.save_every:
        raise NpoError(
            f"autonpo.early.scout_steps is {early.scout_steps}, not a multiple of train.save_every "
            f"({train.save_every}): the scout's last step has no checkpoint",
            f"autonpo.early.scout_steps={train.save_every}",
        )
    if recipe.autonpo.replay.acceptance_test and early.replay_steps % train.save_every:
        raise NpoError(
            f"autonpo.early.replay_steps is {early.replay_steps}, not a multiple of train.save_every "
            f"({train.save_every}): the scout has no checkpoint to compare the replay with "
            "(autonpo.replay.acceptance_test)",
            f"autonpo.early.replay_steps={early.scout_steps}",
        )
    tested = recipe.autonpo.replay.acceptance_test
    if tested and early.replay_steps < early.scout_steps and train.keep_weights_only is not None:
        raise NpoError(
            f"autonpo.early.replay_steps is {early.replay_steps} and autonpo.early.scout_steps {early.scout_steps}: "
            "autonpo.replay.acceptance_test needs the scout's checkpoint at the end of the replay, which "
            "train.keep_weights_only may have deleted by then",
            f"autonpo.early.replay_steps={early.scout_steps}",
        )


DECIDING_SECTIONS = ("autonpo", "scoring", "guide", "extrapolation")
"""Sections that determine what AutoNPO does."""


def dump_autonpo_settings(recipe: Recipe) -> dict[str, Any]:
    """The sections that determine what AutoNPO does, as plain data."""
    plain = recipe.model_dump(mode="json")
    return {name: plain[name] for name in DECIDING_SECTIONS}


def find_start(
    run: RunDir, *, overrides: Sequence[str], at: int | None, source_branch: str | None, new_branch: str | None
) -> tuple[ResumePoint, AutoNPOState]:
    """The branch to continue, and the controller's state there."""
    if at is not None:
        undo = find_undo(run, source_branch or find_main_branch(run))
        replay = {"guide": None, "new_branch": new_branch, "steps": None}
        start = fork(run, source_branch, at, overrides=overrides, undo=undo, **replay)
        return start, AutoNPOState(branch=start.branch, step=at)
    before = read_transitions(run)
    if before:
        state = before[-1].state
        if source_branch not in (None, state.branch):
            raise NpoError(
                f"AutoNPO is active on branch {state.branch} of {run.root}, not on {source_branch}",
                f"omit --branch, or fork a branch for it: npo resume {quote_path(run.root)} --autonpo "
                f"--branch {source_branch} --at STEP",
            )
        return find_resume_point(run, state.branch, overrides), state
    start = find_resume_point(run, source_branch, overrides)
    refuse_scout(run, start.branch, "AutoNPO does not control")
    return start, AutoNPOState(branch=start.branch, step=find_first_segment(run, start.branch).fork_step)
