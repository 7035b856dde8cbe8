"""Which checkpoints may shrink or go. A plan is made from plain facts, then carried out.

Two quotas, each a number of newest ones kept: `keep_anchors` full states (older ones become weights-only guides)
and `keep_guides` weights-only checkpoints (older ones are deleted). What a rollback, a guide or a scoring may
still need is protected: it neither shrinks nor goes, whatever the quotas say.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from npo_cli.run_dir.auto import transitions
from npo_cli.run_dir.checkpoints import (
    Checkpoint,
    delete_checkpoint,
    demote_checkpoint,
    history,
    list_checkpoints,
    sweep,
)
from npo_cli.run_dir.guides import list_guides
from npo_cli.run_dir.lineage import branches, owner_of, segments
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import Scoring, latest_scores, scorings

Place = tuple[str, int]
"""Branch and step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Steps of one branch."""

    demote: tuple[int, ...]
    """Anchors that become weights-only guides."""
    delete: tuple[int, ...]
    """Checkpoints that go."""


def plan_retention(
    checkpoints: Sequence[Checkpoint],
    *,
    protected: Collection[int],
    keep_anchors: int | None,
    keep_guides: int | None,
) -> Plan:
    """What to demote and delete among the checkpoints of one branch; a quota of None keeps all.

    Step 0 and the newest anchor are always protected. A protected checkpoint counts in its quota.
    """
    anchors = sorted(found.step for found in checkpoints if found.tier == "anchor")
    safe = {0, *protected, *anchors[-1:]}
    kept_anchors = safe | set(_newest(anchors, keep_anchors))
    demote = [step for step in anchors if step not in kept_anchors]
    guides = sorted({found.step for found in checkpoints if found.tier == "guide"} | set(demote))
    kept_guides = safe | set(_newest(guides, keep_guides))
    delete = [step for step in guides if step not in kept_guides]
    return Plan(demote=tuple(step for step in demote if step not in delete), delete=tuple(delete))


def _newest(steps: Sequence[int], quota: int | None) -> Sequence[int]:
    return steps if quota is None else steps[max(0, len(steps) - quota) :]


def apply_retention(run: RunDir, branch: str, *, keep_anchors: int | None, keep_guides: int | None) -> Plan:
    """Carry out the plan for a branch, and clear what dead writers left. Only for the one writer."""
    there = list_checkpoints(run, branch)
    protected = {step for owner, step in protected_places(run) if owner == branch}
    plan = plan_retention(there, protected=protected, keep_anchors=keep_anchors, keep_guides=keep_guides)
    for checkpoint in there:
        if checkpoint.step in plan.delete:
            delete_checkpoint(checkpoint)
        elif checkpoint.step in plan.demote:
            demote_checkpoint(checkpoint)
    sweep(run.checkpoints_folder(branch))
    return plan


def protected_places(run: RunDir) -> set[Place]:
    """Checkpoints that something unfinished, or something that may be repeated, rests on.

    Fork points; learner, guide and older copy of every guide cache; the older copies that an extrapolated guide of a
    branch goes back to; learner and candidates of every unfinished scoring; learner
    and choice of the newest finished one; both ends of an intervention that a branch's recipe plans; and all that
    AutoNPO may go back to.
    """
    wanted: set[Place] = set()
    for segment in segments(run):
        if segment.parent is not None:
            wanted.add((segment.parent, segment.fork_step))
    own_guides = [info for info in list_guides(run) if info.run_id == run.run_id]
    for info in own_guides:
        steps = (info.at_step, info.guide_step, info.older_step)
        wanted |= {(info.branch, step) for step in steps if step is not None}
    for scoring in scorings(run):
        if not scoring.finished:
            wanted |= _places_of(scoring)
    newest = latest_scores(run)
    if newest is not None:
        chosen = [score.step for score in newest.scores if score.chosen]
        wanted |= {(newest.branch, step) for step in (newest.at, *chosen)}
    for branch in branches(run):
        planned = run.recipe(branch).get("guide", {}).get("replay") or {}
        wanted |= {(branch, planned[end]) for end in ("at_step", "guide_step") if planned.get(end) is not None}
        wanted |= older_copies(run, branch)
    wanted |= within_reach(run)
    return {(owner_of(run, branch, step), step) for branch, step in wanted}


def older_copies(run: RunDir, branch: str) -> set[Place]:
    """What an extrapolated guide needs from the newest checkpoint on: as far back as its k, and one save more."""
    recipe = run.recipe(branch)
    wanted = recipe.get("guide", {}).get("source") == "extrapolated" or recipe.get("autonpo", {}).get("extrapolate")
    if not wanted:
        return set()
    settings, every = recipe["extrapolation"], recipe["train"]["save_every"]
    farthest = max((settings["k"], *settings["k_grid"]) if settings["refresh"] else (settings["k"],))
    steps = [found.step for found in history(run, branch)]
    return {(branch, step) for step in steps if step > max(steps) - farthest - every}


def within_reach(run: RunDir) -> set[Place]:
    """What the next AutoNPO rollback may need: all checkpoints within the largest rollback distance of the newest."""
    moves = transitions(run)
    if not moves:
        return set()
    branch = moves[-1].state.branch
    recipe = run.recipe(branch)
    every, distances = recipe["train"]["save_every"], recipe["autonpo"]["rollback"]["distances"]
    farthest = max((distance for distance in distances if distance % every == 0), default=0)
    steps = [found.step for found in history(run, branch)]
    return {(branch, step) for step in steps if step >= max(steps) - farthest}


def _places_of(scoring: Scoring) -> set[Place]:
    return {(scoring.branch, step) for step in (scoring.at, *scoring.candidates)}
