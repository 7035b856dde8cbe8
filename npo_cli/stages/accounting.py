"""The account of a run: everything it executed, whatever became of it, seen from one branch.

A curve (`ledger.py`) charges an arm with what that arm needed; an account leaves nothing out. Held-out evaluations
are nobody's cost.
"""

from collections.abc import Iterator
from pathlib import Path

from npo_cli.costs import RunCosts
from npo_cli.guide_records import GuideCacheInfo
from npo_cli.loading import recipe_from_dict
from npo_cli.run_dir.auto import ProbeStore, list_acceptance_tests, count_probe_tokens, list_probes, read_transitions
from npo_cli.run_dir.guides import list_guide_caches, read_queried_prompts
from npo_cli.run_dir.lineage import find_first_segment, list_branches, ancestry
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import list_sample_stores
from npo_cli.run_dir.seconds import sum_sampling_seconds
from npo_cli.run_dir.steps import read_metrics

ACCEPTANCE_EVENTS = ("kept", "reverted")
REJECTION_EVENTS = ("rejected", "unguided", "missed", "reverted")


def compute_run_costs(run: RunDir, branch: str) -> RunCosts:
    """Updates, tokens and seconds of the whole run; only which steps count as abandoned depends on the branch.

    A step done again after a kill is one step, and the seconds of both times.
    """
    line = ancestry(run, branch)
    # Every step was made once, on the line or off it.
    reached, updates, on_line, off_line = find_first_segment(run, branch).fork_step, 0, 0, 0
    for owner in list_branches(run):
        per_step = recipe_from_dict(run.read_recipe(owner), source=str(run.recipe_path(owner))).train.num_updates
        for row in read_metrics(run, owner):
            updates += per_step
            if any(stretch.branch == owner and stretch.contains(row["step"]) for stretch in line):
                reached, on_line = max(reached, row["step"]), on_line + int(row["tokens"])
            else:
                off_line += int(row["tokens"])
    found, moves = list_probes(run), read_transitions(run)
    return RunCosts(
        branch=branch,
        step=reached,
        updates=updates,
        training_tokens=on_line,
        probe_tokens=sum(count_probe_tokens(probe) for probe in found),
        guide_tokens=guide_tokens(run),
        acceptance_test_tokens=sum(int(move.evidence.get("num_tokens", 0)) for move in moves if move.event in ACCEPTANCE_EVENTS),
        abandoned_tokens=off_line,
        seconds=sum(sum_sampling_seconds(folder) for folder in timed_folders(run, found)),
        num_interventions=sum(move.event == "rolled_back" and not move.evidence.get("early") for move in moves),
        num_rejections=sum(move.event in REJECTION_EVENTS for move in moves),
    )


def guide_tokens(run: RunDir) -> int:
    """What finding and asking guides took: samples of every cache, finished or not, and of every scoring."""
    caches = sum(cache_tokens(run, info) for info in list_guide_caches(run))
    samples = (row for scoring in list_sample_stores(run) for row in scoring.samples.iter_rows())
    return caches + sum(len(row["response_ids"]) for row in samples)


def cache_tokens(run: RunDir, info: GuideCacheInfo) -> int:
    """Generated for one cache, so far where it is unfinished."""
    if info.complete:
        return info.num_tokens
    return sum(asked.num_tokens for asked in read_queried_prompts(run.guide_folder(info.name)).values())


def timed_folders(run: RunDir, found: list[ProbeStore]) -> Iterator[Path]:
    """Every folder that keeps a clock: branches, guide caches, scorings, probes, held-out tests that decided."""
    yield from (run.branch_folder(branch) for branch in list_branches(run))
    yield from (run.guide_folder(info.name) for info in list_guide_caches(run))
    yield from (scoring.folder for scoring in list_sample_stores(run))
    yield from (probe.folder for probe in found)
    yield from list_acceptance_tests(run)
