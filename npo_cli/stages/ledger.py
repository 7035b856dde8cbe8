"""What an arm of a run cost for what it reached: by index, by optimiser steps, by tokens, by wall clock.

An arm is a branch. A replayed branch is charged with everything it needed: its parent up to the last of fork, guide
and scored candidates, the scoring of its learner that came before it, the guide's samples, and its own steps. A probe
is charged to the branch whose policy was probed, from that step on; a replay that was judged worse and taken back, to
the branch that goes on instead, as is the test that decided. Other held-out evaluation is charged to nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from npo_cli.costs import CostToThreshold, CurvePoint
from npo_cli.records import Segment
from npo_cli.run_dir.auto import acceptance_test_folder, count_probe_tokens, list_probes, read_transitions
from npo_cli.run_dir.guides import load_guide
from npo_cli.run_dir.index import select_best_evals
from npo_cli.run_dir.journal import JsonlLog
from npo_cli.run_dir.lineage import find_first_segment, ancestry
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import SCREENING_INDEX, SampleStore, read_all_scores, list_sample_stores
from npo_cli.run_dir.seconds import sum_sampling_seconds, read_step_seconds
from npo_cli.run_dir.steps import read_metrics


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
    asked = [found for found in scorings_before_fork(run, born) if (found.branch, found.learner_step) == (info.branch, info.learner_step)]
    ahead = born.fork_step if info.guide_step is None else info.guide_step
    last = max(born.fork_step, ahead, *(step for scoring in asked for step in scoring.candidates))
    scored = sum((scoring_cost(scoring) for scoring in asked), start=ZERO_COST)
    return cost_at(run, info.branch, last) + cache_cost(run, info.name) + scored


def scoring_cost(scoring: SampleStore) -> Cost:
    """What sampling for a scoring took; an older copy read along with arms whose logits were pushed."""
    named = enumerate(scoring.settings.get("sources", ()))
    read_twice = {SCREENING_INDEX - place for place, name in named if name.startswith("extrapolated logits:")}
    told = [(row["arm"], len(row["response_ids"])) for row in scoring.samples.iter_rows()]
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
    saved = {answer.folder: datetime.fromisoformat(answer.saved_at).replace(microsecond=0) for answer in read_all_scores(run)}
    return [scoring for scoring in list_sample_stores(run) if scoring.folder in saved and saved[scoring.folder] <= birth]


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
