"""What an arm of a run cost for what it reached: by index, by optimiser steps, by tokens, by wall clock.

An arm is a branch. A replayed branch is charged with everything it needed: its parent up to the last of fork, guide
and scored candidates, the scoring of its learner that came before it, the guide's samples, and its own steps. A probe
is charged to the branch whose policy was probed, from that step on; a replay that was judged worse and taken back, to
the branch that goes on instead, as is the test that decided. Other held-out evaluation is charged to nobody.

The account of a run: everything it executed, whatever became of it, seen from one branch.

A curve (`ledger.py`) charges an arm with what that arm needed; an account leaves nothing out. Held-out evaluations
are nobody's cost.

The account of a run by kind of work: the same sums as `accounting.py`, told apart further.

A scout is a step that was rolled back and whose branch's later checkpoint was the guide of what is kept now; other
steps off the line are abandoned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from npo_cli.config.loading import recipe_from_dict
from npo_cli.storage.autonpo_log import (
    ProbeStore,
    acceptance_test_folder,
    count_probe_tokens,
    list_acceptance_tests,
    list_probes,
    read_transitions,
)
from npo_cli.storage.guide_cache import list_guide_caches, load_guide, read_queried_prompts
from npo_cli.storage.index import select_best_evals
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry, find_first_segment, list_branches
from npo_cli.storage.metrics import read_metrics, read_step_seconds, sum_sampling_seconds
from npo_cli.storage.sample_store import SCREENING_INDEX, SampleStore, list_sample_stores, read_all_scores, read_evals
from npo_cli.types.costs import ActivityCost, CostToThreshold, CurvePoint, RunCosts
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What an arm had spent."""

    steps: int
    tokens: int
    seconds: float
    older_forwards: int = 0
    """Forward passes of older copies while sampling, beside the one that each token takes."""

    @property
    def forwards(self) -> int:
        """Forward passes of sampling alone: not prefills, nor passes that score or train on whole responses."""
        return self.tokens + self.older_forwards

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            older_forwards=self.older_forwards + other.older_forwards,
        )


ZERO_COST = Cost(steps=0, tokens=0, seconds=0.0)


def cost_at(run: RunDir, branch: str, step: int) -> Cost:
    """Everything spent for the branch to stand at `step`."""
    return cumulative_costs(run, branch)[step]


def cumulative_costs(run: RunDir, branch: str) -> dict[int, Cost]:
    """The same for every step of the branch's line of descent, in one pass over the files."""
    born = find_first_segment(run, branch)
    spent = ZERO_COST if born.parent is None else fork_cost(run, born)
    parents = {0: spent} if born.parent is None else cumulative_costs(run, born.parent)
    known = {step: cost for step, cost in parents.items() if step <= born.fork_step}
    probed, judged = probe_costs(run, branch), acceptance_test_costs(run, branch)
    for step, own in step_costs(run, branch).items():
        spent = spent + own + probed.get(step, ZERO_COST)
        known[step] = spent
        # Standing here cost no more; going on from here does.
        spent = spent + judged.get(step, ZERO_COST)
    return known


def step_costs(run: RunDir, branch: str) -> dict[int, Cost]:
    """What each of the branch's own steps took."""
    seconds = read_step_seconds(run, branch)
    return {
        row["step"]: Cost(
            steps=1,
            tokens=int(row["tokens"]),
            seconds=seconds.get(row["step"], 0.0),
            older_forwards=int(row.get("forwards", row["tokens"]) - row["tokens"]),
        )
        for row in read_metrics(run, branch)
    }


def probe_costs(run: RunDir, branch: str) -> dict[int, Cost]:
    """What asking the mistakes again had cost, by the step whose policy was asked."""
    costs: dict[int, Cost] = {}
    for probe in list_probes(run):
        if probe.branch == branch:
            asked = Cost(steps=0, tokens=count_probe_tokens(probe), seconds=sum_sampling_seconds(probe.folder))
            costs[probe.step] = costs.get(probe.step, ZERO_COST) + asked
    return costs


def acceptance_test_costs(run: RunDir, branch: str) -> dict[int, Cost]:
    """The held-out tests after which the branch went on, by step; with each replay taken back, its steps and guide."""
    costs: dict[int, Cost] = {}
    for before, move in pairwise(read_transitions(run)):
        if move.event in ("kept", "reverted") and move.state.branch == branch:
            replayed = before.state.branch
            seconds = sum_sampling_seconds(acceptance_test_folder(run, replayed, move.step))
            costs[move.step] = Cost(steps=0, tokens=int(move.evidence.get("num_tokens", 0)), seconds=seconds)
            if move.event == "reverted":
                guide = find_first_segment(run, replayed).guide_cache
                asked = ZERO_COST if guide is None else cache_cost(run, guide)
                costs[move.step] += sum(step_costs(run, replayed).values(), start=asked)
    return costs


def cache_cost(run: RunDir, name: str) -> Cost:
    """What asking a guide took."""
    info, _ = load_guide(run, name)
    twice = info.source == "extrapolated" and info.origin.startswith("logits")
    seconds = sum_sampling_seconds(run.guide_folder(name))
    return Cost(steps=0, tokens=info.num_tokens, seconds=seconds, older_forwards=info.num_tokens if twice else 0)


def fork_cost(run: RunDir, born: Segment) -> Cost:
    """What a replay had cost before its first step."""
    if born.guide_cache is None:
        return cost_at(run, born.parent or born.branch, born.fork_step)
    info, _ = load_guide(run, born.guide_cache)
    asked = [
        found
        for found in scorings_before_fork(run, born)
        if (found.branch, found.learner_step) == (info.branch, info.learner_step)
    ]
    ahead = born.fork_step if info.guide_step is None else info.guide_step
    last = max(born.fork_step, ahead, *(step for scoring in asked for step in scoring.candidates))
    scored = sum((scoring_cost(scoring) for scoring in asked), start=ZERO_COST)
    return cost_at(run, info.branch, last) + cache_cost(run, info.name) + scored


def scoring_cost(scoring: SampleStore) -> Cost:
    """What sampling for a scoring took; an older copy read along with arms whose logits were pushed."""
    named = enumerate(scoring.settings.get("sources", ()))
    read_twice = {SCREENING_INDEX - place for place, name in named if name.startswith("extrapolated logits:")}
    told = [(row["candidate"], len(row["response_ids"])) for row in scoring.samples.iter_rows()]
    return Cost(
        steps=0,
        tokens=sum(count for _, count in told),
        seconds=sum_sampling_seconds(scoring.folder),
        older_forwards=sum(count for arm, count in told if arm in read_twice),
    )


def scorings_before_fork(run: RunDir, born: Segment) -> list[SampleStore]:
    """Scorings finished by the time the branch was born: what came later cannot have cost it anything."""
    rows = JsonlLog(run.segments_path).iter_rows()
    birth = min(datetime.fromisoformat(row["time"]) for row in rows if row["branch"] == born.branch)
    saved = {
        answer.folder: datetime.fromisoformat(answer.saved_at).replace(microsecond=0) for answer in read_all_scores(run)
    }
    return [
        scoring for scoring in list_sample_stores(run) if scoring.folder in saved and saved[scoring.folder] <= birth
    ]


def learning_curve(run: RunDir, branch: str, *, name: str) -> list[CurvePoint]:
    """Held-out accuracy along the branch's line of descent, with its costs."""
    line = ancestry(run, branch)
    seen = {
        step: report
        for (owner, step), report in select_best_evals(run).items()
        if any(stretch.branch == owner and stretch.contains(step) for stretch in line)
    }
    entropies = {
        row["step"]: row["entropy"]
        for stretch in line
        for row in read_metrics(run, stretch.branch)
        if stretch.contains(row["step"])
    }
    costs = cost_at_steps(run, branch)
    return [
        CurvePoint(
            name=name,
            step=step,
            total_steps=cost.steps,
            total_tokens=cost.tokens,
            total_seconds=cost.seconds,
            total_forwards=cost.forwards,
            accuracy=report.accuracy,
            entropy=entropies.get(step),
        )
        for step, report in sorted(seen.items())
        for cost in costs[step]
    ]


def cost_at_steps(run: RunDir, branch: str) -> dict[int, list[Cost]]:
    """Cost of standing at each step; at a replay's fork also the cost of being ready, with nothing learned yet."""
    born = find_first_segment(run, branch)
    costs = {step: [cost] for step, cost in cumulative_costs(run, branch).items()}
    if born.parent is not None:
        costs[born.fork_step].append(fork_cost(run, born))
    return costs


def cost_to_threshold(points: Sequence[CurvePoint], threshold: float) -> CostToThreshold:
    """The first evaluation at which the mean of it and its two neighbours reaches the threshold.

    The ends have one neighbour. None in every field where the curve ends below: censored, not infinite.
    """
    distinct = [point for place, point in enumerate(points) if place == 0 or point.step != points[place - 1].step]
    accuracies = [point.accuracy for point in distinct]
    for place, point in enumerate(distinct):
        near = accuracies[max(0, place - 1) : place + 2]
        if sum(near) / len(near) >= threshold:
            return CostToThreshold(
                name=point.name,
                threshold=threshold,
                step=point.step,
                total_steps=point.total_steps,
                total_tokens=point.total_tokens,
                total_seconds=point.total_seconds,
                total_forwards=point.total_forwards,
            )
    arm = points[0].name if points else ""
    return CostToThreshold(name=arm, threshold=threshold, step=None, total_steps=None, total_tokens=None)


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
        acceptance_test_tokens=sum(
            int(move.evidence.get("num_tokens", 0)) for move in moves if move.event in ACCEPTANCE_EVENTS
        ),
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
