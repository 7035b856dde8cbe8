"""The account of a run by kind of work: the same sums as `accounting.py`, told apart further.

A scout is a step that was rolled back and whose branch's later checkpoint was the guide of what is kept now; other
steps off the line are abandoned.
"""

from collections.abc import Iterator

from npo_cli.costs import ActivityCost
from npo_cli.run_dir.auto import list_acceptance_tests, count_probe_tokens, list_probes, read_transitions
from npo_cli.run_dir.guides import list_guide_caches
from npo_cli.run_dir.lineage import find_first_segment, list_branches, ancestry
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import read_evals, list_sample_stores
from npo_cli.run_dir.seconds import sum_sampling_seconds
from npo_cli.stages.accounting import ACCEPTANCE_EVENTS, cache_tokens
from npo_cli.stages.ledger import ZERO_COST, Cost, step_costs

BranchStep = tuple[str, int]


def cost_lines(run: RunDir, branch: str) -> Iterator[ActivityCost]:
    """Everything the run executed, seen from one branch; the sum; and evaluation, which is nobody's cost."""
    parts = [*_training(run, branch), *_sampling(run)]
    yield from parts
    yield ActivityCost(
        activity="all of it",
        steps=sum(one.steps or 0 for one in parts),
        tokens=sum(one.tokens for one in parts),
        seconds=sum(one.seconds or 0.0 for one in parts),
    )
    tested = sum(report.num_tokens for report in read_evals(run))
    yield ActivityCost(activity="held-out evaluation, not counted", steps=None, tokens=tested, seconds=None)


def _training(run: RunDir, branch: str) -> Iterator[ActivityCost]:
    line, scouts = ancestry(run, branch), scout_steps(run, branch)
    kept = scout = abandoned = ZERO_COST
    for owner in list_branches(run):
        for step, cost in step_costs(run, owner).items():
            if any(stretch.branch == owner and stretch.contains(step) for stretch in line):
                kept += cost
            elif (owner, step) in scouts:
                scout += cost
            else:
                abandoned += cost
    yield _trained(f"training, on the line of {branch}", kept)
    yield _trained("scouting: rolled back, and guided what is kept", scout)
    yield _trained("training, abandoned", abandoned)


def _trained(what: str, cost: Cost) -> ActivityCost:
    return ActivityCost(activity=what, steps=cost.steps, tokens=cost.tokens, seconds=cost.seconds)


def scout_steps(run: RunDir, branch: str) -> set[BranchStep]:
    """Steps between the learner and the guide of every replay on the line."""
    caches = {info.name: info for info in list_guide_caches(run)}
    guides = [find_first_segment(run, stretch.branch).guide_cache for stretch in ancestry(run, branch)]
    return {
        (stretch.branch, step)
        for info in (caches[name] for name in guides if name in caches)
        if info.guide_step is not None and info.source != "run"
        for stretch in ancestry(run, info.branch)
        for step in range(info.learner_step + 1, info.guide_step + 1)
        if stretch.contains(step)
    }


def _sampling(run: RunDir) -> Iterator[ActivityCost]:
    asked = list_sample_stores(run)
    yield ActivityCost(
        activity="scoring of candidates",
        steps=None,
        tokens=sum(len(row["response_ids"]) for scoring in asked for row in scoring.samples.iter_rows()),
        seconds=sum(sum_sampling_seconds(scoring.folder) for scoring in asked),
    )
    found = list_probes(run)
    yield ActivityCost(
        activity="probes of mistakes",
        steps=None,
        tokens=sum(map(count_probe_tokens, found)),
        seconds=sum(sum_sampling_seconds(probe.folder) for probe in found),
    )
    caches = list_guide_caches(run)
    yield ActivityCost(
        activity="guides' samples",
        steps=None,
        tokens=sum(cache_tokens(run, info) for info in caches),
        seconds=sum(sum_sampling_seconds(run.guide_folder(info.name)) for info in caches),
    )
    decided = [move for move in read_transitions(run) if move.event in ACCEPTANCE_EVENTS]
    yield ActivityCost(
        activity="held-out tests that decided",
        steps=None,
        tokens=sum(int(move.evidence.get("num_tokens", 0)) for move in decided),
        seconds=sum(map(sum_sampling_seconds, list_acceptance_tests(run))),
    )
