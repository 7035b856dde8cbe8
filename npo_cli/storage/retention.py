"""Which checkpoints are demoted to weights only or deleted. A plan is made first, then carried out.

Two quotas of newest ones kept: `train.keep_full_checkpoints` (older ones become weights only) and
`train.keep_weights_only` (older ones are deleted). What a rollback, a guide or a scoring may still need is protected,
whatever the quotas say.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import (
    Checkpoint,
    delete_checkpoint,
    demote_checkpoint,
    list_ancestry_checkpoints,
    list_checkpoints,
    remove_leftovers,
)
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_policy_branch, list_branches, read_segments
from npo_cli.storage.sample_store import SampleStore, find_latest_scores, list_sample_stores
from npo_cli.storage.scouts import drop_used_scouts

BranchStep = tuple[str, int]
"""Branch and step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionPlan:
    """Steps of one branch."""

    demote: tuple[int, ...]
    """Full checkpoints that become weights only."""
    delete: tuple[int, ...]
    """Checkpoints that are deleted."""


def plan_retention(
    checkpoints: Sequence[Checkpoint],
    *,
    protected: Collection[int],
    keep_full_checkpoints: int | None,
    keep_weights_only: int | None,
) -> RetentionPlan:
    """What to demote and delete among the checkpoints of one branch; a quota of None keeps all.

    Step 0 and the newest full checkpoint are always protected. A protected checkpoint counts towards its quota.
    """
    full = sorted(found.step for found in checkpoints if found.tier == "full")
    safe = {0, *protected, *full[-1:]}
    kept_full = safe | set(_newest(full, keep_full_checkpoints))
    demote = [step for step in full if step not in kept_full]
    weights = sorted({found.step for found in checkpoints if found.tier == "weights"} | set(demote))
    kept_weights = safe | set(_newest(weights, keep_weights_only))
    delete = [step for step in weights if step not in kept_weights]
    return RetentionPlan(demote=tuple(step for step in demote if step not in delete), delete=tuple(delete))


def _newest(steps: Sequence[int], quota: int | None) -> Sequence[int]:
    return steps if quota is None else steps[max(0, len(steps) - quota) :]


@on_main_rank
def apply_retention(
    run: RunDir, branch: str, *, keep_full_checkpoints: int | None, keep_weights_only: int | None
) -> RetentionPlan:
    """Carry out the plan for a branch, remove what killed writers left, and drop scouts. Needs the run's lock."""
    there = list_checkpoints(run, branch)
    protected = {step for owner, step in find_protected_checkpoints(run) if owner == branch}
    plan = plan_retention(
        there, protected=protected, keep_full_checkpoints=keep_full_checkpoints, keep_weights_only=keep_weights_only
    )
    for checkpoint in there:
        if checkpoint.step in plan.delete:
            delete_checkpoint(checkpoint)
        elif checkpoint.step in plan.demote:
            demote_checkpoint(checkpoint)
    remove_leftovers(run.checkpoints_folder(branch))
    drop_used_scouts(run)
    return plan


def find_protected_checkpoints(run: RunDir) -> set[BranchStep]:
    """Checkpoints that unfinished work, or work that may be repeated, needs.

    Fork points, teachers and merged checkpoints of branches; learner, guide, scout and older copy of every guide cache;
    the older copies that an extrapolated guide of a branch goes back to; learner and candidates of every unfinished
    scoring; learner and choice of the newest finished one; both ends of an intervention that a branch's recipe plans;
    and all that AutoNPO may go back to.
    """
    needed: set[BranchStep] = set()
    live = set(list_branches(run))
    for segment in read_segments(run):
        if segment.parent is not None and segment.branch in live:
            needed.add((segment.parent, segment.fork_step))
            needed |= {segment.teacher} if segment.teacher else set()
            needed |= set(segment.merged_checkpoints)
    own_guides = [info for info in list_guide_caches(run) if info.run_id == run.run_id]
    for info in own_guides:
        steps = (info.learner_step, info.guide_step, info.older_step)
        needed |= {(info.branch, step) for step in steps if step is not None}
        needed |= {info.scout} if info.scout is not None else set()
    for scoring in list_sample_stores(run.scores_folder):
        if not scoring.is_finished:
            needed |= _checkpoints_of(scoring)
    newest = find_latest_scores(run)
    if newest is not None:
        chosen = [score.step for score in newest.scores if score.is_selected and score.step is not None]
        needed |= {(newest.branch, step) for step in (newest.learner_step, *chosen)}
    for branch in list_branches(run):
        planned = run.read_recipe(branch).get("guide", {}).get("replay") or {}
        needed |= {(branch, planned[end]) for end in ("at_step", "guide_step") if planned.get(end) is not None}
        needed |= find_extrapolation_checkpoints(run, branch)
    needed |= find_rollback_checkpoints(run)
    return {(find_policy_branch(run, branch, step), step) for branch, step in needed}


def find_extrapolation_checkpoints(run: RunDir, branch: str) -> set[BranchStep]:
    """What an extrapolated guide needs from the newest checkpoint on: as far back as its k, and one save more."""
    recipe = run.read_recipe(branch)
    if recipe.get("guide", {}).get("source") != "extrapolated":
        return set()
    settings, every = recipe["extrapolation"], recipe["train"]["save_every"]
    steps = [found.step for found in list_ancestry_checkpoints(run, branch)]
    return {(branch, step) for step in steps if step > max(steps) - settings["k"] - every}


def find_rollback_checkpoints(run: RunDir) -> set[BranchStep]:
    """What the next AutoNPO rollback may need: all checkpoints within the largest rollback distance of the newest."""
    moves = read_transitions(run)
    if not moves:
        return set()
    branch = moves[-1].state.branch
    recipe = run.read_recipe(branch)
    every, distances = recipe["train"]["save_every"], recipe["autonpo"]["rollback"]["distances"]
    farthest = max((distance for distance in distances if distance % every == 0), default=0)
    steps = [found.step for found in list_ancestry_checkpoints(run, branch)]
    return {(branch, step) for step in steps if step >= max(steps) - farthest}


def _checkpoints_of(scoring: SampleStore) -> set[BranchStep]:
    return {(scoring.spec.branch, step) for step in (scoring.spec.step, *scoring.spec.checkpoints)}
