"""The account of a run: everything it executed, whatever became of it, seen from one branch.

A curve (`ledger.py`) charges an arm with what that arm needed; an account leaves nothing out. Held-out evaluations
are nobody's cost.
"""

from collections.abc import Iterator
from pathlib import Path

from npo_cli.costs import Account
from npo_cli.guide_records import GuideInfo
from npo_cli.loading import from_dict
from npo_cli.run_dir.auto import ProbeFolder, judgements, probe_tokens, probes, transitions
from npo_cli.run_dir.guides import list_guides, read_asked
from npo_cli.run_dir.lineage import birth_segment, branches, descent
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import scorings
from npo_cli.run_dir.seconds import seconds_in
from npo_cli.run_dir.steps import measured_steps

JUDGED = ("kept", "reverted")
IN_VAIN = ("rejected", "unguided", "missed", "reverted")


def account(run: RunDir, branch: str) -> Account:
    """Updates, tokens and seconds of the whole run; only which steps count as abandoned depends on the branch.

    A step done again after a kill is one step, and the seconds of both times.
    """
    line = descent(run, branch)
    # Every step was made once, on the line or off it.
    reached, updates, on_line, off_line = birth_segment(run, branch).fork_step, 0, 0, 0
    for owner in branches(run):
        per_step = from_dict(run.recipe(owner), source=str(run.recipe_path(owner))).train.num_updates
        for row in measured_steps(run, owner):
            updates += per_step
            if any(stretch.branch == owner and stretch.owns(row["step"]) for stretch in line):
                reached, on_line = max(reached, row["step"]), on_line + int(row["tokens"])
            else:
                off_line += int(row["tokens"])
    found, moves = probes(run), transitions(run)
    return Account(
        branch=branch,
        step=reached,
        updates=updates,
        training_tokens=on_line,
        probe_tokens=sum(probe_tokens(probe) for probe in found),
        guide_tokens=guide_tokens(run),
        judge_tokens=sum(int(move.evidence.get("num_tokens", 0)) for move in moves if move.event in JUDGED),
        abandoned_tokens=off_line,
        seconds=sum(seconds_in(folder) for folder in timed_folders(run, found)),
        interventions=sum(move.event == "rolled_back" and not move.evidence.get("early") for move in moves),
        rejections=sum(move.event in IN_VAIN for move in moves),
    )


def guide_tokens(run: RunDir) -> int:
    """What finding and asking guides took: samples of every cache, finished or not, and of every scoring."""
    caches = sum(tokens_of(run, info) for info in list_guides(run))
    samples = (row for scoring in scorings(run) for row in scoring.samples.records())
    return caches + sum(len(row["response_ids"]) for row in samples)


def tokens_of(run: RunDir, info: GuideInfo) -> int:
    """Generated for one cache, so far where it is unfinished."""
    if info.complete:
        return info.num_tokens
    return sum(asked.num_tokens for asked in read_asked(run.guide_folder(info.name)).values())


def timed_folders(run: RunDir, found: list[ProbeFolder]) -> Iterator[Path]:
    """Every folder that keeps a clock: branches, guide caches, scorings, probes, held-out tests that decided."""
    yield from (run.branch_folder(branch) for branch in branches(run))
    yield from (run.guide_folder(info.name) for info in list_guides(run))
    yield from (scoring.folder for scoring in scorings(run))
    yield from (probe.folder for probe in found)
    yield from judgements(run)
