"""Branches: where each one was forked, and the line of descent from a branch back to the first.

segments.jsonl is append-only. The first segment creates a branch; later segments of the same branch record that it was
resumed, perhaps with other settings, and the last one that it was removed: its files are gone, its costs stay, and its
name is not used again. This module knows nothing of checkpoints, which may be deleted.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import cached_by_file, check_range, damaged_file_error, now_utc, to_row
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import FIRST_BRANCH, NAME_PATTERN, RECIPE_FILE, RunDir, validate_name
from npo_cli.storage.log_head import damaged_log_error
from npo_cli.types.rollouts import Segment

OPTIONAL_FIELDS = ("teacher", "merge_weight", "merge_plus", "merge_minus", "is_scout", "removed")
"""Of a segment: absent where they are empty."""


class Span(NamedTuple):
    """The steps (from_step, to_step] that a line of descent takes from one branch."""

    branch: str
    from_step: int
    """Step the branch starts from; the first branch also owns its step 0."""
    to_step: int | None
    """Step at which the next branch was forked; None for the last branch."""
    is_merged: bool = False
    """The branch has a merged start: the line takes the weights of `from_step` from this branch, too."""

    def contains(self, step: int) -> bool:
        """Whether the line takes this step, its training, from this branch."""
        after_start = step > self.from_step or (step == 0 and self.from_step == 0)
        return after_start and (self.to_step is None or step <= self.to_step)


def find_policy_owner(line: Sequence[Span], step: int) -> str | None:
    """The branch that a line of descent takes the weights of a step from: the newest with a merged start there, else
    the one that trained the step. None where it has no such step."""
    merged = [span.branch for span in line if span.is_merged and span.from_step == step]
    trained = [span.branch for span in line if span.contains(step)]
    return merged[-1] if merged else next(iter(trained), None)


def append_segment(run: RunDir, segment: Segment, *, overrides: Sequence[str] = ()) -> None:
    """Record that training starts or resumes; from then on the branch exists. Sealed before it returns."""
    validate_name(segment.branch)
    log = JsonlLog(run.segments_path)
    row = {name: value for name, value in to_row(segment).items() if name not in OPTIONAL_FIELDS or value}
    log.append({"time": now_utc(), **row, "overrides": list(overrides)})
    log.seal()


@cached_by_file(lambda run: run.segments_path)
def read_segments(run: RunDir) -> tuple[Segment, ...]:
    """Every segment, oldest first."""
    found = tuple(map(_with_tuples, JsonlLog(run.segments_path).read_records(Segment)))
    for number, segment in enumerate(found, start=1):
        check_range(segment, ("fork_step", "guide_until"), f"{run.segments_path}, line {number}")
        if not all(NAME_PATTERN.fullmatch(name) for name in (segment.branch, segment.parent or segment.branch)):
            raise damaged_file_error(
                f"{run.segments_path}, line {number}", f"no branch can be named {segment.branch!r}"
            )
    if not found and any(run.branches_folder.glob("*/checkpoints/step_*")):
        raise damaged_log_error(run.segments_path, "it has no line, but checkpoints were saved")
    return found


def _with_tuples(segment: Segment) -> Segment:
    """The segment as it was written: a file has lists."""
    teacher = None if segment.teacher is None else tuple(segment.teacher)
    return replace(segment, teacher=teacher, removed=tuple(segment.removed))


def list_branches(run: RunDir) -> list[str]:
    """Names of the branches, oldest first; without those that were removed."""
    every = read_segments(run)
    removed = {segment.branch for segment in every if segment.removed}
    return list(dict.fromkeys(segment.branch for segment in every if segment.branch not in removed))


def list_result_branches(run: RunDir) -> list[str]:
    """The same without scouts: what the run was trained for."""
    return [name for name in list_branches(run) if not is_scout(run, name)]


def is_scout(run: RunDir, branch: str) -> bool:
    """Whether a branch is a disposable scout."""
    return find_first_segment(run, branch).is_scout


def refuse_scout(run: RunDir, branch: str, problem: str) -> None:
    """Raise for a branch that is a scout: "`branch` is a scout, which `problem`"."""
    if branch in list_branches(run) and is_scout(run, branch):
        raise NpoError(
            f"{branch} is a scout, which {problem}",
            f"use it as a guide or teacher: --source scout:{branch}, target.teacher=scout:{branch}; its training: "
            f"npo show {quote_path(run.root)} metrics --branch {branch}",
        )


def list_recorded_branches(run: RunDir) -> list[str]:
    """Names of all branches that there ever were, oldest first."""
    return list(dict.fromkeys(segment.branch for segment in read_segments(run)))


def check_branch(run: RunDir, branch: str) -> None:
    """Refuse a branch that the run does not have, or no longer."""
    if branch in list_branches(run):
        return
    names = ", ".join(list_branches(run)) or "none yet"
    was = " any more: it was removed" if branch in list_recorded_branches(run) else ""
    raise NpoError(
        f"{run.root} has no branch {branch!r}{was}; it has: {names}", f"see npo show {quote_path(run.root)} lineage"
    )


def find_main_branch(run: RunDir) -> str:
    """`main`, which commands act on where no branch is named. An error where nothing was trained yet."""
    find_newest_branch(run)
    return FIRST_BRANCH


def find_newest_branch(run: RunDir) -> str:
    """The branch that was trained on last, scouts left out. No command's default: it moves with every command."""
    every = read_segments(run)
    if not every:
        raise NpoError(
            f"nothing was trained in {run.root} yet",
            f"start again in a new folder, or look: npo show {quote_path(run.root)} lineage",
        )
    names = list_result_branches(run)
    return next(segment.branch for segment in reversed(every) if segment.branch in names)


def find_first_segment(run: RunDir, branch: str) -> Segment:
    """The segment that created a branch."""
    every = read_segments(run)
    for segment in every:
        if segment.branch == branch:
            return segment
    names = ", ".join(dict.fromkeys(segment.branch for segment in every)) or "none yet"
    raise NpoError(
        f"{run.root} has no branch {branch!r}; it has: {names}", f"see npo show {quote_path(run.root)} lineage"
    )


def ancestry(run: RunDir, branch: str) -> list[Span]:
    """The line of descent, oldest branch first: (main, 0, 80), (guided, 80, None) for a branch forked from main at 80.

    A parent that was forked later than the line leaves it contributes no step and is not in the line, nor is one that
    was forked there, unless its start is merged.
    """
    line: list[Span] = []
    seen: set[str] = set()
    name: str | None = branch
    end: int | None = None
    while name is not None:
        first = find_first_segment(run, name)
        if name in seen:
            raise NpoError(f"{run.segments_path}: branch {name!r} descends from itself", "restore the file from a copy")
        seen.add(name)
        is_merged = first.merge_plus is not None
        has_steps = end is None or end > first.fork_step or first.parent is None
        if has_steps or (is_merged and end == first.fork_step):
            line.append(Span(name, first.fork_step, end, is_merged))
        end = first.fork_step if end is None else min(end, first.fork_step)
        name = first.parent
    return list(reversed(line))


def find_last_guided_fork(run: RunDir, branch: str) -> int | None:
    """Step at which the newest replay with a guide on the line of descent began; None without one."""
    first = (find_first_segment(run, span.branch) for span in ancestry(run, branch))
    return max((segment.fork_step for segment in first if segment.guide_cache is not None), default=None)


def find_owning_branch(run: RunDir, branch: str, step: int) -> str:
    """The branch on the line of descent that trained this step."""
    return next((span.branch for span in ancestry(run, branch) if span.contains(step)), branch)


def find_policy_branch(run: RunDir, branch: str, step: int) -> str:
    """The branch on the line of descent that has the checkpoint of this step."""
    return find_policy_owner(ancestry(run, branch), step) or branch


def choose_replay_name(branch: str, at: int) -> str:
    """Name of guide cache and branch where none is given: `replay-40`, on another branch than main `late-replay-40`."""
    return f"replay-{at}" if branch == FIRST_BRANCH else f"{branch}-replay-{at}"


def choose_scout_name(branch: str, at: int) -> str:
    """Name of a scout where none is given: `scout-40`, on another branch than main `late-scout-40`."""
    return f"scout-{at}" if branch == FIRST_BRANCH else f"{branch}-scout-{at}"


def find_free_branch_name(run: RunDir, wish: str, *, exact: bool = False) -> str:
    """The name wished for, or the first free one of `wish-2`, `wish-3`...; with `exact` a taken name is an error.

    A folder with a recipe and no more, which a kill before the first segment leaves, does not take a name.
    """
    validate_name(wish)
    taken = set(list_recorded_branches(run))
    if run.branches_folder.is_dir():
        entries = run.branches_folder.glob("*/*")
        taken |= {entry.parent.name for entry in entries if entry.name != RECIPE_FILE}
    if wish not in taken:
        return wish
    if exact:
        raise NpoError(f"{run.root} already has a branch {wish!r}", "choose another name with --new-branch, or omit it")
    number = 2
    while f"{wish}-{number}" in taken:
        number += 1
    return validate_name(f"{wish}-{number}")
