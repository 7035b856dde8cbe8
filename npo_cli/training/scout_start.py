"""Where a disposable scout starts and with which recipe, or where it is resumed: found out without a model."""

from npo_cli.config.loading import diff_recipes, override_saved_recipe, recipe_from_dict, replace_values
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, find_free_branch_name, list_branches, refuse_scout
from npo_cli.storage.scouts import has_ended, place_base
from npo_cli.training.start_point import ResumePoint, begin_scout, find_resume_point
from npo_cli.types.guides import ScoutRequest
from npo_cli.types.rollouts import Segment


def choose_scout(run: RunDir, scout: ScoutRequest) -> ResumePoint | None:
    """Where a scout starts, or where it is resumed; None if it has ended. Refused where its name is taken."""
    recipe, name = make_scout_recipe(run, scout), scout.name
    if name in list_branches(run):
        check_same_scout(run, scout, recipe)
        return None if has_ended(run, name) else find_resume_point(run, name, ())
    checkpoint = find_checkpoint(run, scout.branch, scout.at)
    segment = Segment(
        branch=find_free_branch_name(run, name, exact=True),
        parent=scout.branch,
        fork_step=scout.at,
        guide_cache=None,
        guide_until=None,
        is_scout=True,
    )
    start = ResumePoint(
        recipe=place_base(run, recipe, segment), branch=name, checkpoint=checkpoint, segment=segment, is_new=True
    )
    return begin_scout(start)


def make_scout_recipe(run: RunDir, scout: ScoutRequest) -> Recipe:
    """The recipe of a scout; settings that say nothing about one are refused."""
    refuse_scout(run, scout.branch, "is not scouted from")
    saved, path = replace_values(run.read_recipe(scout.branch), scout.undo), run.recipe_path(scout.branch)
    parent = override_saved_recipe(saved, scout.overrides, path=path, purpose="fork")
    again = scout.format_command(quote_path(run.root), name=scout.name)
    before = recipe_from_dict(saved, source=str(path))
    for section in ("eval", "target"):
        changed = [key for key, _, _ in diff_recipes(before, parent) if key.startswith(f"{section}.")]
        if changed:
            raise NpoError(f"{changed[0]} has no effect on a scout", f"remove it: {again} --steps N")
    if parent.guide.experience.replay_fraction:
        raise NpoError(
            "a scout is plain GRPO: it is not available in a run with guide.experience.replay_fraction",
            f"a later checkpoint guides as well: npo sample-guide {quote_path(run.root)} --at {scout.at} --source STEP",
        )
    length = scout.steps or parent.scout.num_steps
    if length is None:
        raise NpoError("the scout's length is missing: the recipe has no scout.num_steps", f"{again} --steps N")
    try:
        return parent.make_scout(num_steps=scout.at + length)
    except ValueError as error:
        raise NpoError(str(error), "npo config scout   # explains the settings") from error


def check_same_scout(run: RunDir, scout: ScoutRequest, recipe: Recipe) -> None:
    """Refuse a branch of that name that is no scout of this step with these settings."""
    name, at, branch = scout.name, scout.at, scout.branch
    first, hint = find_first_segment(run, name), scout.format_command(quote_path(run.root))
    if not first.is_scout or (first.parent, first.fork_step) != (branch, at):
        raise NpoError(f"{run.root} already has a branch {name!r}, which is no scout from step {at} of {branch}", hint)
    saved = recipe_from_dict(run.read_recipe(name), source=str(run.recipe_path(name)))
    wanted, own = (place_base(run, one, first) for one in (recipe, saved))
    differing = [f"{key}={before} instead of {after}" for key, before, after in diff_recipes(own, wanted)]
    if differing:
        raise NpoError(f"{run.root} already has a scout {name}, with {differing[0]}", hint)
