"""`npo train --dry-run` and `npo resume --dry-run`: what would be trained, and what it would cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from npo_cli.config.recipe import Recipe
from npo_cli.session.dry_run import open_dry_session, plan_steps
from npo_cli.session.session import open_policy, open_task
from npo_cli.storage.layout import check_unused, open_run
from npo_cli.storage.lock import hold_unchanged
from npo_cli.training.disk import check_disk_space, plan_disk
from npo_cli.training.resume import open_active_guide
from npo_cli.training.start_point import choose_start
from npo_cli.training.train import MAIN, settle_recipe
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import PlannedWork


def plan_training(
    root: Path, recipe: Recipe, *, until: int | None, check: Callable[[Recipe, int], None] | None = None
) -> Iterator[PlannedWork | Notice]:
    """The steps, evaluations and disk space of a new run; `check` as in `create_session`."""
    check_unused(root)
    recipe = settle_recipe(recipe)
    last = until or recipe.train.num_steps
    with closing(open_task(recipe)) as task:
        if check is not None:
            check(recipe, len(task.train))
        policy = open_policy(recipe, task, None)
        check_disk_space(root, recipe, policy, last_step=last)
        yield from plan_steps(recipe, task, branch=MAIN, first=1, last=last)
        yield from plan_disk(root, recipe, policy, last_step=last)


def plan_resume(
    root: Path,
    *,
    overrides: Sequence[str],
    at: int | None,
    guide: str | None,
    source_branch: str | None,
    new_branch: str | None,
    steps: int | None,
    until: int | None = None,
    fresh: bool = False,
) -> Iterator[PlannedWork | Notice]:
    """The steps that would be trained, after the checks of `resume_run`."""
    run = open_run(root)
    with hold_unchanged(run):
        start = choose_start(
            run,
            overrides=overrides,
            at=at,
            guide=guide,
            source_branch=source_branch,
            new_branch=new_branch,
            steps=steps,
            until=until,
            fresh=fresh,
        )
        with (
            open_dry_session(run, start.recipe, checkpoint=start.checkpoint) as session,
            open_active_guide(session, start.segment) as guidance,
        ):
            if start.is_new:
                yield Notice(message=f"new branch: {start.branch}")
            first = 1 if start.checkpoint is None else start.checkpoint.step + 1
            last, before = until or start.recipe.train.num_steps, start.segment.parent if start.is_new else start.branch
            yield from plan_steps(
                start.recipe,
                session.task,
                branch=start.branch,
                first=first,
                last=last,
                recorded=(run, before or start.branch),
            )
            if guidance is not None:
                name, end = start.segment.guide_cache, min(last, guidance.until_step)
                yield PlannedWork(work=f"inject guide {name}", steps=f"{first}-{end}", prompts=len(guidance.rollouts))
            yield from plan_disk(root, start.recipe, session.policy, first_step=first, last_step=last)
