"""Which branch `npo resume` continues: the one whose last command did not end by itself.

A command that trains ends by itself when it reaches its last step (`train.num_steps`, or `--until`); it then logs the
event `finished` with the line of segments.jsonl that it began with. A branch is *interrupted* if its last line in
segments.jsonl has no such event, its newest checkpoint is before `train.num_steps`, and AutoNPO has not left it for
another branch. No clock and no order between branches decides, so that the answer stays until that branch is resumed.
"""

from dataclasses import dataclass

from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import list_checkpoints
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, find_main_branch, list_branches, read_segments
from npo_cli.storage.metrics import append_event, read_events


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeTarget:
    """The branch that training continues on, and why."""

    branch: str
    step: int
    """Of its newest checkpoint, or the step it was forked at."""
    num_steps: int
    """train.num_steps of its recipe."""
    is_interrupted: bool
    """False: no branch was interrupted, or another one was named."""
    others: tuple[str, ...] = ()
    """Other branches that were interrupted, before this one."""

    def describe(self) -> str:
        """`resume branch late: interrupted at step 60 of 200`."""
        where = f"at step {self.step} of {self.num_steps}"
        why = f"interrupted {where}" if self.is_interrupted else where
        also = f"; also interrupted: {', '.join(self.others)} (--branch NAME)" if self.others else ""
        return f"resume branch {self.branch}: {why}{also}"


def record_finish(run: RunDir, branch: str) -> None:
    """Log that the command that trained the branch ended by itself."""
    append_event(run, "finished", {"branch": branch, "segment": _last_segment_numbers(run)[branch]})


def list_finished_branches(run: RunDir) -> list[str]:
    """Branches whose last command logged that it ended by itself, in the order in which these commands began."""
    ended = {(event.get("branch"), event.get("segment")) for event in read_events(run) if event["kind"] == "finished"}
    return [branch for branch, number in _list_starts(run) if (branch, number) in ended]


def list_interrupted_branches(run: RunDir) -> list[str]:
    """Branches whose last command did not end by itself; the one that was started last is last."""
    finished = list_finished_branches(run)
    moves = [transition.state.branch for transition in read_transitions(run)]
    left = set(moves) - set(moves[-1:])
    return [
        branch
        for branch, _ in _list_starts(run)
        if branch not in finished and branch not in left and not _is_trained(run, branch)
    ]


def find_resume_target(run: RunDir, branch: str | None = None) -> ResumeTarget:
    """The named branch; else the branch interrupted last; else main."""
    interrupted = list_interrupted_branches(run)
    chosen = branch or (interrupted[-1] if interrupted else find_main_branch(run))
    others = () if branch else tuple(interrupted[:-1])
    return ResumeTarget(
        branch=chosen,
        step=find_last_saved_step(run, chosen),
        num_steps=_num_steps(run, chosen),
        is_interrupted=chosen in interrupted,
        others=others,
    )


def find_last_saved_step(run: RunDir, branch: str) -> int:
    """Step of the branch's own newest checkpoint, or without one the step that it was forked at."""
    steps = [found.step for found in list_checkpoints(run, branch)]
    return max(steps, default=find_first_segment(run, branch).fork_step)


def find_autonpo_branch(run: RunDir) -> str | None:
    """The branch that AutoNPO is on; None without AutoNPO."""
    moves = read_transitions(run)
    return moves[-1].state.branch if moves else None


def _is_trained(run: RunDir, branch: str) -> bool:
    return find_last_saved_step(run, branch) >= _num_steps(run, branch)


def _num_steps(run: RunDir, branch: str) -> int:
    return int(run.read_recipe(branch)["train"]["num_steps"])


def _list_starts(run: RunDir) -> list[tuple[str, int]]:
    """(branch, number of its last segment) in the order of these segments."""
    return sorted(_last_segment_numbers(run).items(), key=lambda pair: pair[1])


def _last_segment_numbers(run: RunDir) -> dict[str, int]:
    """The last line of each branch in segments.jsonl, counted from 1, in the order of the branches' first lines."""
    every = read_segments(run)
    return {
        branch: max(number for number, segment in enumerate(every, start=1) if segment.branch == branch)
        for branch in list_branches(run)
    }
