"""`npo ls`: the runs below a folder, what they reached, and whether a process is at work in them."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import decode_record, read_json
from npo_cli.storage.index import find_best_branch, measure_size, select_best_evals
from npo_cli.storage.interrupted import find_last_saved_step, list_interrupted_branches
from npo_cli.storage.layout import RUN_INFO_FILE, RunDir, open_run
from npo_cli.storage.lineage import list_result_branches
from npo_cli.storage.lock import LockHolder
from npo_cli.storage.scouts import list_scouts
from npo_cli.types.views import RunListing

MAX_NOTE_CHARS = 300


def find_runs(folder: Path) -> Iterator[Path]:
    """Run directories in a folder, at any depth, by path; hidden folders and links are not entered."""
    if not folder.is_dir():
        raise NpoError(f"there is no folder {folder}", f"npo ls {quote_path(folder.parent)}")
    for home, names, files in os.walk(folder):
        if RUN_INFO_FILE in files:
            names.clear()
            yield Path(home)
        else:
            names[:] = sorted(name for name in names if not name.startswith("."))


def list_runs(folder: Path) -> Iterator[RunListing]:
    """One listing per run; one that cannot be read is listed as damaged."""
    for root in find_runs(folder):
        try:
            yield describe_run(root)
        except NpoError as error:
            yield RunListing(
                run=str(root),
                recipe="-",
                branches=(),
                step=0,
                num_steps=0,
                best_accuracy=None,
                best_branch=None,
                best_step=None,
                size_bytes=measure_size(root),
                state="damaged",
                note=error.message[:MAX_NOTE_CHARS],
            )


def describe_run(root: Path) -> RunListing:
    """What a run reached, read without its lock."""
    run = open_run(root)
    names = list_result_branches(run)
    farthest = max(names, key=lambda name: find_last_saved_step(run, name))
    evals = [one for one in select_best_evals(run).values() if one.branch in names]
    best = max(evals, key=lambda one: (one.accuracy, -one.step), default=None)
    holder, interrupted = find_holder(run), list_interrupted_branches(run)
    return RunListing(
        run=str(root),
        recipe=str(run.read_recipe().get("name", "-")),
        branches=tuple(names),
        scouts=tuple(list_scouts(run)),
        step=find_last_saved_step(run, farthest),
        num_steps=int(run.read_recipe(farthest)["train"]["num_steps"]),
        best_accuracy=None if best is None else best.accuracy,
        best_branch=None if best is None else find_best_branch(run),
        best_step=None if best is None else best.step,
        size_bytes=measure_size(root),
        state="running" if holder else "stopped" if interrupted else "finished",
        note=holder or ", ".join(interrupted),
    )


def find_holder(run: RunDir) -> str:
    """The process that holds the run by its note, `process 4711 on host`; empty if none does.

    The lock itself is not tried: that would disturb a writer that starts. A note of a process of this machine that has
    ended is stale.
    """
    if not run.holder_path.exists():
        return ""
    holder = decode_record(LockHolder, read_json(run.holder_path), run.holder_path)
    if holder.host == platform.node() and not _is_alive(holder.pid):
        return ""
    return f"process {holder.pid} on {holder.host}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
