"""Disposable scouts: what still needs their checkpoints, and when these are dropped.

A scout makes guide caches, and is the teacher of dense targets; each is a *use*. A cache needs the scout until it is
complete (a lazy one until every replay with it is over), a branch until it has saved the last step of its target's
window. A scout that has ended, that was used and that nothing needs any more loses its checkpoints, unless its recipe
says `scout.keep`. Its lines, rollouts and costs stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from npo_cli.config.loading import recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.checkpoints import delete_checkpoint, find_checkpoint, list_checkpoints, remove_leftovers
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.interrupted import find_last_saved_step, list_finished_branches, record_finish
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, is_scout, list_branches
from npo_cli.storage.metrics import append_event
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoutUse:
    """What learns from a scout."""

    kind: str
    """`guide` or `branch`."""
    name: str
    is_over: bool
    """It needs the scout's checkpoints no more."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def list_scouts(run: RunDir) -> list[str]:
    """Scouts that were not removed, oldest first."""
    return [name for name in list_branches(run) if is_scout(run, name)]


def list_scout_uses(run: RunDir, scout: str) -> Iterator[ScoutUse]:
    """Guide caches that were sampled from a scout, then branches whose teacher it is."""
    for info in list_guide_caches(run):
        if info.scout is not None and info.scout[0] == scout:
            yield ScoutUse(kind="guide", name=info.name, is_over=_is_filled(run, info))
    for branch in list_branches(run):
        first = find_first_segment(run, branch)
        if first.teacher is not None and first.teacher[0] == scout:
            yield ScoutUse(kind="branch", name=branch, is_over=_has_learned(run, first))


def _is_filled(run: RunDir, info: GuideCacheInfo) -> bool:
    """Whether no response will be sampled for a cache any more."""
    if not info.lazy_settings:
        return info.complete
    replays = [find_first_segment(run, name) for name in list_branches(run)]
    ends = {one.branch: one.guide_until for one in replays if one.guide_cache == info.name}
    return bool(ends) and all(find_last_full_step(run, name) >= (until or 0) for name, until in ends.items())


def _has_learned(run: RunDir, first: Segment) -> bool:
    """Whether the branch can be resumed after its target's window alone."""
    recipe = recipe_from_dict(run.read_recipe(first.branch), source=str(run.recipe_path(first.branch)))
    last = recipe.target.find_last_step(fork_step=first.fork_step)
    return last is not None and find_last_full_step(run, first.branch) >= last


def find_last_full_step(run: RunDir, branch: str) -> int:
    """Step of the branch's own newest full checkpoint; -1 without one."""
    return max((found.step for found in list_checkpoints(run, branch) if found.tier == "full"), default=-1)


def has_ended(run: RunDir, scout: str) -> bool:
    """Whether a scout's training is over, by its last step or by its reward."""
    num_steps = int(run.read_recipe(scout)["train"]["num_steps"])
    return scout in list_finished_branches(run) or find_last_saved_step(run, scout) >= num_steps


def check_not_dropped(run: RunDir, scout: str) -> None:
    """Refuse a scout that was used and has no checkpoint left."""
    if scout in list_finished_branches(run) and not list_checkpoints(run, scout):
        first, uses = find_first_segment(run, scout), ", ".join(map(str, list_scout_uses(run, scout)))
        raise NpoError(
            f"the checkpoints of scout {scout} were dropped when used: {uses}",
            f"train another one: npo scout {quote_path(run.root)} --branch {first.parent} --at {first.fork_step} "
            "--name NEW scout.keep=true",
        )


def read_scout_recipe(run: RunDir, scout: str) -> Recipe:
    """The recipe of a scout, with its base where it lies now."""
    recipe = recipe_from_dict(run.read_recipe(scout), source=str(run.recipe_path(scout)))
    return place_base(run, recipe, find_first_segment(run, scout))


def place_base(run: RunDir, recipe: Recipe, first: Segment) -> Recipe:
    """The recipe of a scout that is forked by `first`: of one that trains adapters in a run without any, the model is
    the frozen checkpoint at its fork."""
    assert first.parent is not None, "a scout is forked"
    if not _has_own_base(run, recipe, first.parent):
        return recipe
    folder = find_checkpoint(run, first.parent, first.fork_step).path.absolute()
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(folder)})})


def forget_base(run: RunDir, recipe: Recipe, first: Segment) -> Recipe:
    """The recipe as it is saved: with the run's own model, so that the run directory can be moved."""
    assert first.parent is not None, "a scout is forked"
    if not _has_own_base(run, recipe, first.parent):
        return recipe
    path = run.read_recipe(first.parent)["model"]["path"]
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})


def _has_own_base(run: RunDir, recipe: Recipe, parent: str) -> bool:
    return recipe.model.lora.rank is not None and run.read_recipe(parent)["model"]["lora"]["rank"] is None


@on_main_rank
def drop_used_scouts(run: RunDir) -> list[str]:
    """Delete the checkpoints of every scout that nothing needs any more; their names. Needs the run's lock."""
    dropped = []
    for scout in list_scouts(run):
        home = run.checkpoints_folder(scout)
        is_empty = not home.is_dir() or not any(home.iterdir())
        if is_empty or run.read_recipe(scout).get("scout", {}).get("keep") or not has_ended(run, scout):
            continue
        uses = list(list_scout_uses(run, scout))
        if not uses or not all(use.is_over for use in uses):
            continue
        if scout not in list_finished_branches(run):
            record_finish(run, scout)  # without checkpoints it would count as interrupted
        append_event(run, "scout_dropped", {"branch": scout})
        for checkpoint in list_checkpoints(run, scout):
            delete_checkpoint(checkpoint)
        remove_leftovers(home)
        dropped.append(scout)
    return dropped
