"""`npo train --autonpo --dry-run` and `npo resume --autonpo --dry-run`: the steps, and what interventions may add."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from npo_cli.autonpo.controller import is_early_scout_due
from npo_cli.autonpo.preflight import find_start, usable_distances, validate_autonpo_settings
from npo_cli.autonpo.rungs import Rung, undo_rung
from npo_cli.config.recipe import Recipe
from npo_cli.registry import RUNGS
from npo_cli.session.dry_run import open_dry_session, plan_samples, plan_steps, recorded_length
from npo_cli.storage.layout import open_run
from npo_cli.storage.lock import hold_unchanged
from npo_cli.training.disk import plan_disk
from npo_cli.training.dry_run import plan_training
from npo_cli.training.train import MAIN
from npo_cli.types.autonpo import AutoNPOState
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import PlannedWork


def plan_autonpo_training(root: Path, recipe: Recipe) -> Iterator[PlannedWork | Notice]:
    """A new run under AutoNPO."""
    yield from plan_training(root, recipe, until=None, check=validate_autonpo_settings)
    yield from plan_early_scout(AutoNPOState(branch=MAIN, step=0), recipe, mean_length=None)
    yield from plan_interventions(recipe, mean_length=None)


def plan_autonpo_resume(
    root: Path, *, overrides: Sequence[str], at: int | None, source_branch: str | None, new_branch: str | None
) -> Iterator[PlannedWork | Notice]:
    """A run that is continued, or forked, under AutoNPO."""
    run = open_run(root)
    with hold_unchanged(run):
        start, state = find_start(run, overrides=overrides, at=at, source_branch=source_branch, new_branch=new_branch)
        recipe = undo_rung(run, start.recipe, start.branch)
        with open_dry_session(run, recipe, checkpoint=start.checkpoint) as session:
            validate_autonpo_settings(recipe, len(session.task.train))
            if start.is_new:
                yield Notice(message=f"new branch: {start.branch}")
            first = 1 if start.checkpoint is None else start.checkpoint.step + 1
            last, before = start.recipe.train.num_steps, start.segment.parent if start.is_new else start.branch
            recorded = (run, before or start.branch)
            if first <= last:
                yield from plan_steps(
                    start.recipe, session.task, branch=start.branch, first=first, last=last, recorded=recorded
                )
                yield from plan_disk(root, start.recipe, session.policy, first_step=first, last_step=last)
            mean_length = recorded_length(*recorded)
            yield from plan_early_scout(state, recipe, mean_length=mean_length)
            yield from plan_interventions(start.recipe, mean_length=mean_length)


def plan_early_scout(state: AutoNPOState, recipe: Recipe, *, mean_length: float | None) -> Iterator[PlannedWork]:
    """The disposable scout that a run begins with; nothing where it does not, or not any more."""
    if is_early_scout_due(state, recipe.autonpo):
        length = recipe.autonpo.early.scout_steps
        yield plan_scout_samples("the early bootstrap: scout", recipe, num_steps=length, mean_length=mean_length)


def plan_interventions(recipe: Recipe, *, mean_length: float | None) -> Iterator[PlannedWork | Notice]:
    """At most what one intervention adds: its probe, its guide cache and the steps that are trained again."""
    autonpo, train = recipe.autonpo, recipe.train
    distance = min(usable_distances(recipe)[-1], train.num_steps)
    if autonpo.max_interventions >= 0:
        yield Notice(message=f"at most {autonpo.max_interventions} interventions")
    rungs: list[Rung] = [RUNGS.get(name) for name in autonpo.ladder]
    if any(rung.needs_probe for rung in rungs):
        yield plan_samples(
            "an intervention: probe",
            num_prompts=autonpo.probe.num_prompts,
            samples_per_prompt=autonpo.probe.samples_per_prompt,
            recipe=recipe,
            mean_length=mean_length,
        )
    yield from (plan_window(rung, recipe, mean_length=mean_length) for rung in rungs if rung.has_window)
    if all(rung.has_window for rung in rungs):
        return
    yield plan_samples(
        "an intervention: guide",
        num_prompts=min(recipe.task.pool_size, distance * train.prompts_per_step),
        samples_per_prompt=recipe.guide.cache.samples_per_prompt,
        recipe=recipe,
        mean_length=mean_length,
    )
    yield plan_samples(
        f"an intervention: {distance} steps",
        num_prompts=distance * train.prompts_per_step,
        samples_per_prompt=train.group_size,
        recipe=recipe,
        mean_length=mean_length,
    )


def plan_window(rung: Rung, recipe: Recipe, *, mean_length: float | None) -> PlannedWork:
    """At most what the window of a rung adds: its guide, its scout, the steps that a rollback trains again, or nothing
    but the steps that are trained anyway."""
    autonpo, train = recipe.autonpo, recipe.train
    name = f"a window: {rung.name}"
    if rung.trains_scout:
        return plan_scout_samples(name, recipe, num_steps=autonpo.rungs.scout_steps, mean_length=mean_length)
    num_prompts = min(autonpo.rungs.num_steps, train.num_steps) * train.prompts_per_step
    samples = 0
    if rung.samples_guide:
        num_prompts, samples = min(recipe.task.pool_size, num_prompts), recipe.guide.cache.samples_per_prompt
    elif rung.needs_probe:
        samples = autonpo.rungs.group_size
    return plan_samples(
        name,
        num_prompts=num_prompts if samples else 0,
        samples_per_prompt=samples,
        recipe=recipe,
        mean_length=mean_length,
    )


def plan_scout_samples(name: str, recipe: Recipe, *, num_steps: int, mean_length: float | None) -> PlannedWork:
    """The rollouts of a disposable scout."""
    scout = recipe.make_scout(num_steps=num_steps).train
    return plan_samples(
        name,
        num_prompts=num_steps * scout.prompts_per_step,
        samples_per_prompt=scout.group_size,
        recipe=recipe,
        mean_length=mean_length,
    )
