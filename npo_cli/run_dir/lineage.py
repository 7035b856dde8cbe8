"""Branches: where each one left its parent, and the line of descent from a branch back to the first.

segments.jsonl only grows. A branch is born with its first segment; later segments of the same branch record that
it was resumed, perhaps with other settings. This file knows nothing of checkpoints, which may be deleted.
"""

from collections.abc import Sequence
from typing import NamedTuple

from npo_cli.errors import NpoError, as_typed
from npo_cli.records import Segment
from npo_cli.run_dir.files import damaged, now_utc, row_of
from npo_cli.run_dir.journal import Journal
from npo_cli.run_dir.paths import NAME, RunDir, valid_name


class Stretch(NamedTuple):
    """The steps (from_step, to_step] that a line of descent takes from one branch."""

    branch: str
    from_step: int
    """Step the branch starts from; the first branch also owns its step 0."""
    to_step: int | None
    """Step at which the next branch left; None on the last one, which is open."""

    def owns(self, step: int) -> bool:
        """Whether the line takes this step from this branch."""
        after_start = step > self.from_step or (step == 0 and self.from_step == 0)
        return after_start and (self.to_step is None or step <= self.to_step)


def append_segment(run: RunDir, segment: Segment, *, overrides: Sequence[str] = ()) -> None:
    """Record that training starts or goes on: from now on the branch exists. Synced before it returns."""
    valid_name(segment.branch)
    journal = Journal(run.segments_path)
    journal.append({"time": now_utc(), **row_of(segment), "overrides": list(overrides)})
    journal.sync()


def segments(run: RunDir) -> list[Segment]:
    """Every segment, oldest first."""
    found = Journal(run.segments_path).built(Segment)
    for number, segment in enumerate(found, start=1):
        if not all(NAME.fullmatch(name) for name in (segment.branch, segment.parent or segment.branch)):
            raise damaged(f"{run.segments_path}, line {number}", f"no branch can be named {segment.branch!r}")
    return found


def branches(run: RunDir) -> list[str]:
    """Names of the branches, oldest first."""
    return list(dict.fromkeys(segment.branch for segment in segments(run)))


def newest_branch(run: RunDir) -> str:
    """The branch that was trained on last."""
    every = segments(run)
    if not every:
        raise NpoError(
            f"nothing was trained in {run.root} yet",
            f"start again in a new folder, or look: npo show {as_typed(run.root)} lineage",
        )
    return every[-1].branch


def birth_segment(run: RunDir, branch: str) -> Segment:
    """The segment a branch was born with."""
    every = segments(run)
    for segment in every:
        if segment.branch == branch:
            return segment
    names = ", ".join(dict.fromkeys(segment.branch for segment in every)) or "none yet"
    raise NpoError(
        f"{run.root} has no branch {branch!r}; it has: {names}", f"see npo show {as_typed(run.root)} lineage"
    )


def descent(run: RunDir, branch: str) -> list[Stretch]:
    """The line of descent, oldest branch first: (main, 0, 80), (guided, 80, None) for a branch that left main at 80.

    A parent that itself left its own parent later than the line left it gave no step and is not in the line.
    """
    line: list[Stretch] = []
    seen: set[str] = set()
    name: str | None = branch
    end: int | None = None
    while name is not None:
        born = birth_segment(run, name)
        if name in seen:
            raise NpoError(f"{run.segments_path}: branch {name!r} descends from itself", "restore the file from a copy")
        seen.add(name)
        if end is None or end > born.fork_step or born.parent is None:
            line.append(Stretch(name, born.fork_step, end))
        end = born.fork_step if end is None else min(end, born.fork_step)
        name = born.parent
    return list(reversed(line))


def owner_of(run: RunDir, branch: str, step: int) -> str:
    """The branch on the line of descent that made this step."""
    for stretch in descent(run, branch):
        if stretch.owns(step):
            return stretch.branch
    return branch


def new_branch_name(run: RunDir, wish: str, *, exact: bool = False) -> str:
    """The name wished for, or the first free one of `wish-2`, `wish-3`...; with `exact` a taken name is an error."""
    valid_name(wish)
    taken = set(branches(run))
    if run.branches_folder.is_dir():
        taken |= {folder.name for folder in run.branches_folder.iterdir()}
    if wish not in taken:
        return wish
    if exact:
        raise NpoError(
            f"{run.root} already has a branch {wish!r}", "choose another name with --branch, or leave it out"
        )
    number = 2
    while f"{wish}-{number}" in taken:
        number += 1
    return valid_name(f"{wish}-{number}")
