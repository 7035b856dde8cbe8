"""What the stages would do and cost, for `--dry-run`: the same checks and errors, and nothing is written."""

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.api.checks import Overrides, check_figure_path, list_overrides, load_run_recipe, resolve_last_step
from npo_cli.api.run import resolve_root
from npo_cli.api.training import check_resume
from npo_cli.guides.source import parse_spec
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import PlannedWork

if TYPE_CHECKING:
    from npo_cli.config.recipe import Recipe


def plan_train(
    recipe: "Recipe", run: str | PathLike[str], *, until: int | None, autonpo: bool
) -> Iterator[PlannedWork | Notice]:
    """`npo.train`."""
    resolve_last_step(until, recipe, after=-1, autonpo=autonpo)
    if autonpo:
        from npo_cli.autonpo.dry_training import plan_autonpo_training

        return plan_autonpo_training(resolve_root(run), recipe)
    from npo_cli.training.dry_run import plan_training

    return plan_training(resolve_root(run), recipe, until=until)


def plan_resume(
    run: str | PathLike[str],
    *,
    at: int | None,
    guide: str | None,
    no_guide: bool,
    branch: str | None,
    new_branch: str | None,
    steps: int | None,
    until: int | None,
    autonpo: bool,
    fresh_optimizer: bool,
    overrides: Overrides,
) -> Iterator[PlannedWork | Notice]:
    """`npo.resume`."""
    checked = check_resume(
        run,
        at=at,
        guide=guide,
        no_guide=no_guide,
        branch=branch,
        new_branch=new_branch,
        steps=steps,
        until=until,
        autonpo=autonpo,
        fresh_optimizer=fresh_optimizer,
        overrides=overrides,
    )
    where = checked.where(at=at)
    yield Notice(message=checked.first_line)
    if autonpo:
        from npo_cli.autonpo.dry_training import plan_autonpo_resume

        yield from plan_autonpo_resume(checked.root, **where)
        return
    from npo_cli.training import dry_run

    replay = {"guide": checked.guide, "steps": steps, "until": until, "fresh": fresh_optimizer}
    yield from dry_run.plan_resume(checked.root, **where, **replay)


def plan_sample_guide(
    run: str | PathLike[str],
    *,
    at: int | None,
    source: str | None,
    name: str | None,
    steps: int | None,
    branch: str | None,
    overrides: Overrides,
) -> Iterator[PlannedWork | Notice]:
    """`npo.sample_guide`."""
    spec = None if source is None else parse_spec(str(source))
    root, settings = resolve_root(run), list_overrides(overrides)
    load_run_recipe(root, settings, branch=branch)
    from npo_cli.guides.dry_run import plan_guide_cache

    return plan_guide_cache(root, spec=spec, at=at, name=name, branch=branch, steps=steps, overrides=settings)


def plan_score(
    run: str | PathLike[str],
    *,
    at: int | None,
    candidates: Sequence[int | str] | None,
    branch: str | None,
    overrides: Overrides,
    figure: Path | None,
) -> Iterator[PlannedWork | Notice]:
    """`npo.score`."""
    check_figure_path(figure)
    root, settings = resolve_root(run), list_overrides(overrides)
    specs = None if candidates is None else [parse_spec(str(candidate)) for candidate in candidates]
    load_run_recipe(root, settings, branch=branch)
    from npo_cli.guides.dry_run import plan_scoring

    return plan_scoring(root, at=at, sources=specs, branch=branch, overrides=settings)
