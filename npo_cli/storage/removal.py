"""`npo rm`: delete a branch and what depends on it; its costs stay, and every log and head stays as it was written.

A line with `removed` is added to segments.jsonl first, sealed: from then on the branch is gone for every reader. Then
each folder is renamed to a hidden name and deleted. After a kill in between, the same command deletes what is left.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.costs import relative_artifact
from npo_cli.storage.files import DELETED_SUFFIX, delete_atomically
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.index import measure_size
from npo_cli.storage.layout import FIRST_BRANCH, RunDir, open_run
from npo_cli.storage.lineage import (
    append_segment,
    check_branch,
    find_first_segment,
    is_scout,
    list_branches,
    list_recorded_branches,
    read_segments,
)
from npo_cli.storage.lock import lock_run
from npo_cli.storage.metrics import append_event
from npo_cli.storage.sample_store import list_sample_stores
from npo_cli.storage.scouts import ScoutUse, list_scout_uses
from npo_cli.types.views import RemovedFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """What a removal deletes."""

    branches: tuple[str, ...]
    """Descendants first, the named branch last."""
    folders: tuple[RemovedFolder, ...]


def remove_branch(root: Path, branch: str, *, recursive: bool, is_confirmed: bool) -> Iterator[RemovedFolder]:
    """The folders of a removal, once they are deleted; without `is_confirmed` nothing is."""
    run = open_run(root)
    if not is_confirmed:
        yield from plan_removal(run, branch, recursive=recursive).folders
        return
    with lock_run(run):
        left = [one for name in list_recorded_branches(run) for one in list_leftovers(run, name)]
        for one in left:
            delete_folder(run.root / one.path)
            yield replace(one, is_deleted=True)
        if any(one.branch == branch for one in left):
            return
        plan = plan_removal(run, branch, recursive=recursive)
        for name in plan.branches:
            own = tuple(one.path for one in plan.folders if one.branch == name)
            append_segment(run, replace(find_first_segment(run, name), removed=own))
            append_event(run, "removed", {"branch": name, "folders": list(own)})
        for one in plan.folders:
            delete_folder(run.root / one.path)
            yield replace(one, is_deleted=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder, or what a killed deletion left of it."""
    if folder.exists():
        delete_atomically(folder)
        return
    dead = folder.parent / f".{folder.name}{DELETED_SUFFIX}"
    shutil.rmtree(dead, ignore_errors=True)


def plan_removal(run: RunDir, branch: str, *, recursive: bool) -> Removal:
    """The branch with its dependents; refused where there are some and `recursive` is false."""
    left = list_leftovers(run, branch)
    if left:
        return Removal(branches=(), folders=left)
    check_branch(run, branch)
    again = f"npo rm {quote_path(run.root)}:{branch}"
    children = list_descendants(run, branch)
    if branch == FIRST_BRANCH:
        forked = f", and {', '.join(children)} fork{'s' * (len(children) == 1)} from it" if children else ""
        raise NpoError(
            f"{FIRST_BRANCH} is the run itself{forked}", f"delete the whole run: rm -r {quote_path(run.root)}"
        )
    names = (*reversed(children), branch)
    moves = read_transitions(run)
    if moves and moves[-1].state.branch in names:
        raise NpoError(
            f"AutoNPO is on branch {moves[-1].state.branch} of {run.root}: without it the run cannot be resumed",
            f"remove another branch, or delete the whole run: rm -r {quote_path(run.root)}",
        )
    folders = tuple(one for name in names for one in list_branch_folders(run, name))
    dependents = [f"branch {name}" for name in children]
    dependents += [f"{one.kind} {Path(one.path).name}" for one in folders if one.kind != "branch"]
    if dependents and not recursive:
        raise NpoError(f"{', '.join(dependents)} depend on branch {branch} of {run.root}", f"{again} --recursive")
    return Removal(branches=names, folders=folders)


def list_descendants(run: RunDir, branch: str) -> list[str]:
    """Branches forked from this one, or with a merged start that it has a checkpoint of, directly or not, parents
    before children; of a scout those that still learn from it."""
    found = [branch]
    for name in list_branches(run):
        learns = any(use.name == name and not use.is_over for one in found for use in _list_branch_uses(run, one))
        first = find_first_segment(run, name)
        starts_from = {first.parent, *(merged for merged, _ in first.merged_checkpoints)}
        if name not in found and (learns or not starts_from.isdisjoint(found)):
            found.append(name)
    return found[1:]


def _list_branch_uses(run: RunDir, branch: str) -> list[ScoutUse]:
    return [use for use in list_scout_uses(run, branch) if use.kind == "branch"] if is_scout(run, branch) else []


def list_branch_folders(run: RunDir, branch: str) -> Iterator[RemovedFolder]:
    """The folder of a branch, and those of guide caches, scorings, probes and calibrations for its policies."""
    caches = [
        run.guide_folder(info.name)
        for info in list_guide_caches(run)
        if branch in (info.branch, None if info.complete or info.scout is None else info.scout[0])
    ]
    stores = {
        "guide cache": caches,
        "scoring": [one.folder for one in list_sample_stores(run.scores_folder) if one.spec.branch == branch],
        "probe": [one.folder for one in list_sample_stores(run.probes_folder) if one.spec.branch == branch],
        "calibration": [one.folder for one in list_sample_stores(run.calibrations_folder) if one.spec.branch == branch],
        "branch": [run.branch_folder(branch)],
    }
    for kind, folders in stores.items():
        for folder in folders:
            yield RemovedFolder(
                path=relative_artifact(run, folder),
                kind=kind,
                branch=branch,
                size_bytes=measure_size(folder),
                is_deleted=False,
            )


def list_leftovers(run: RunDir, branch: str) -> tuple[RemovedFolder, ...]:
    """Folders of a branch that was removed which are still there, after a kill."""
    if branch not in list_recorded_branches(run) or branch in list_branches(run):
        return ()
    found = []
    for path in (path for one in read_segments(run) if one.branch == branch for path in one.removed):
        folder = run.root / path
        dead = folder.parent / f".{folder.name}{DELETED_SUFFIX}"
        there = folder if folder.exists() else dead
        if there.exists():
            size = measure_size(there)
            found.append(RemovedFolder(path=path, kind="left over", branch=branch, size_bytes=size, is_deleted=False))
    return tuple(found)
