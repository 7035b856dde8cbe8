"""Three sums of costs.jsonl.

`cumulative_costs` and `learning_curve` charge a branch with what it needed, by logical step; `compute_run_costs` counts
everything that the run executed; `costs_by_activity` splits the same total by kind of work.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.costs import CostLine, read_cost_lines
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.index import select_best_evals
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry, find_first_segment, list_branches
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.autonpo import REJECTIONS
from npo_cli.types.costs import ActivityCost, CostToThreshold, CurvePoint, RunCosts
from npo_cli.types.rollouts import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """A sum of costs."""

    steps: int
    tokens: int
    seconds: float
    forwards: int = 0
    """Forward passes of sampling alone: no prefills, no passes that score or train on whole responses."""
    updates: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            forwards=self.forwards + other.forwards,
            updates=self.updates + other.updates,
        )


ZERO_COST = Cost(steps=0, tokens=0, seconds=0.0)


@dataclass(frozen=True, slots=True)
class CostTable:
    """costs.jsonl with pieces that were executed again put together."""

    steps: dict[str, dict[int, Cost]] = field(default_factory=lambda: defaultdict(dict))
    """Training steps by branch and step."""
    probes: dict[str, dict[int, Cost]] = field(default_factory=lambda: defaultdict(dict))
    artifacts: dict[str, Cost] = field(default_factory=dict)
    """Everything spent on one artifact."""
    kinds: dict[str, Cost] = field(default_factory=dict)
    """Everything of one kind."""
    acceptance_tests: tuple[CostLine, ...] = ()
    forks: dict[str, CostLine] = field(default_factory=dict)


def read_cost_table(run: RunDir) -> CostTable:
    """One pass over costs.jsonl."""
    merged: dict[tuple[str, str, int, str, str], CostLine] = {}
    seconds: dict[tuple[str, str, int, str, str], float] = defaultdict(float)
    for line in read_cost_lines(run):
        merged[line.key] = line
        seconds[line.key] += line.seconds
    table = CostTable(acceptance_tests=tuple(line for line in merged.values() if line.kind == "acceptance_test"))
    for key, line in merged.items():
        cost = Cost(
            steps=int(line.kind == "train"),
            tokens=line.tokens,
            seconds=seconds[key],
            forwards=line.forwards,
            updates=line.updates,
        )
        table.kinds[line.kind] = table.kinds.get(line.kind, ZERO_COST) + cost
        if line.artifact:
            table.artifacts[line.artifact] = table.artifacts.get(line.artifact, ZERO_COST) + cost
        if line.kind == "train":
            table.steps[line.branch][line.step] = cost
        elif line.kind == "probe":
            table.probes[line.branch][line.step] = table.probes[line.branch].get(line.step, ZERO_COST) + cost
        elif line.kind == "fork":
            table.forks[line.branch] = line
    return table


def cost_at(run: RunDir, branch: str, step: int) -> Cost:
    """Everything spent for the branch to reach `step`."""
    return cumulative_costs(run, branch)[step]


def cumulative_costs(run: RunDir, branch: str, table: CostTable | None = None) -> dict[int, Cost]:
    """The same for every step of the branch's line of descent.

    A branch pays for its parent up to the fork; one with a guide also for the line up to the guide and the scored
    candidates, for the scoring and for the cache. A probe is paid by the branch that was probed, from that step on; an
    acceptance test by the branch that continues, from the next step on, with the replay where it was reverted.
    """
    table = read_cost_table(run) if table is None else table
    first = find_first_segment(run, branch)
    parents = {0: ZERO_COST} if first.parent is None else cumulative_costs(run, first.parent, table)
    spent = fork_cost(run, first, table)
    known = {step: cost for step, cost in parents.items() if step <= first.fork_step}
    tests: dict[int, Cost] = defaultdict(lambda: ZERO_COST)
    for line in table.acceptance_tests:
        if line.branch == branch:
            charged = (table.artifacts.get(name, ZERO_COST) + _branch_cost(table, name) for name in line.charged)
            tests[line.step] += sum(charged, start=table.artifacts[line.artifact])
    for step, own in sorted(table.steps[branch].items()):
        spent = spent + own + table.probes[branch].get(step, ZERO_COST)
        known[step] = spent
        # Reaching this step cost no more; going on from it does.
        spent = spent + tests[step]
    return known


def _branch_cost(table: CostTable, artifact: str) -> Cost:
    """The own steps of a branch that is named by its folder."""
    kind, _, name = artifact.partition("/")
    return sum(table.steps[name].values(), start=ZERO_COST) if kind == "branches" else ZERO_COST


def fork_cost(run: RunDir, first: Segment, table: CostTable) -> Cost:
    """What a branch had cost before its first own step."""
    if first.parent is None:
        return ZERO_COST
    fork = table.forks.get(first.branch)
    if fork is None or fork.until is None:
        return cumulative_costs(run, first.parent, table)[first.fork_step]
    line, last = fork.until
    charged = (table.artifacts.get(name, ZERO_COST) for name in fork.charged)
    return sum(charged, start=cumulative_costs(run, line, table)[last])


def learning_curve(run: RunDir, branch: str, *, name: str) -> list[CurvePoint]:
    """Held-out accuracy along the branch's line of descent, with its costs."""
    line = ancestry(run, branch)
    reports = {
        step: report
        for (owner, step), report in select_best_evals(run).items()
        if any(span.branch == owner and span.contains(step) for span in line)
    }
    entropies = {
        row["step"]: row["entropy"]
        for span in line
        for row in read_metrics(run, span.branch)
        if span.contains(row["step"])
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
        for step, report in sorted(reports.items())
        for cost in costs[step]
    ]


def cost_at_steps(run: RunDir, branch: str) -> dict[int, list[Cost]]:
    """Cost of reaching each step; at a fork also the cost with guide and scoring paid and nothing learned yet."""
    table, first = read_cost_table(run), find_first_segment(run, branch)
    costs = {step: [cost] for step, cost in cumulative_costs(run, branch, table).items()}
    if first.parent is not None:
        costs[first.fork_step].append(fork_cost(run, first, table))
    return costs


def cost_to_threshold(points: Sequence[CurvePoint], threshold: float) -> CostToThreshold:
    """The first evaluation at which the mean of it and its two neighbours reaches the threshold.

    The ends have one neighbour. None in every field where the curve ends below: censored, not infinite.
    """
    distinct = [point for index, point in enumerate(points) if index == 0 or point.step != points[index - 1].step]
    accuracies = [point.accuracy for point in distinct]
    for index, point in enumerate(distinct):
        near = accuracies[max(0, index - 1) : index + 2]
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
    name = points[0].name if points else ""
    return CostToThreshold(name=name, threshold=threshold, step=None, total_steps=None, total_tokens=None)


def compute_run_costs(run: RunDir, branch: str) -> RunCosts:
    """Updates, tokens and seconds of the whole run; only which steps count as abandoned depends on the branch."""
    table, moves = read_cost_table(run), read_transitions(run)
    kept, scout, abandoned = split_training(run, branch, table)
    counted = [cost for kind, cost in table.kinds.items() if kind != "evaluate"]
    return RunCosts(
        branch=branch,
        step=last_step(run, branch, table),
        updates=sum(cost.updates for cost in counted),
        training_tokens=kept.tokens,
        probe_tokens=table.kinds.get("probe", ZERO_COST).tokens,
        guide_tokens=sum(table.kinds.get(kind, ZERO_COST).tokens for kind in ("guide_cache", "score")),
        acceptance_test_tokens=table.kinds.get("acceptance_test", ZERO_COST).tokens,
        calibration_tokens=table.kinds.get("calibration", ZERO_COST).tokens,
        abandoned_tokens=scout.tokens + abandoned.tokens,
        seconds=sum(cost.seconds for cost in counted),
        num_interventions=sum(move.event == "rolled_back" and not move.evidence.get("is_early") for move in moves),
        num_rejections=sum(move.event in REJECTIONS for move in moves),
    )


def last_step(run: RunDir, branch: str, table: CostTable) -> int:
    """The newest step on the branch's line of descent."""
    steps = (step for span in ancestry(run, branch) for step in table.steps[span.branch] if span.contains(step))
    return max(steps, default=find_first_segment(run, branch).fork_step)


def split_training(run: RunDir, branch: str, table: CostTable) -> tuple[Cost, Cost, Cost]:
    """Training on the branch's line of descent, training that guided it and was rolled back, and all other training."""
    line, scouts = ancestry(run, branch), scout_steps(run, branch)
    kept = scout = abandoned = ZERO_COST
    for owner in list_branches(run):
        for step, cost in table.steps[owner].items():
            if any(span.branch == owner and span.contains(step) for span in line):
                kept += cost
            elif (owner, step) in scouts:
                scout += cost
            else:
                abandoned += cost
    return kept, scout, abandoned


def scout_steps(run: RunDir, branch: str) -> set[tuple[str, int]]:
    """Steps (branch, step) between the learner and the guide of every replay on the line of descent."""
    caches = {info.name: info for info in list_guide_caches(run)}
    guides = [find_first_segment(run, span.branch).guide_cache for span in ancestry(run, branch)]
    return {
        (span.branch, step)
        for info in (caches[name] for name in guides if name in caches)
        if info.guide_step is not None
        for span in ancestry(run, info.branch)
        for step in range(info.learner_step + 1, info.guide_step + 1)
        if span.contains(step)
    }


def costs_by_activity(run: RunDir, branch: str) -> Iterator[ActivityCost]:
    """Everything the run executed by kind of work, seen from one branch; the total; and evaluation, which no branch
    is charged with."""
    table = read_cost_table(run)
    kept, scout, abandoned = split_training(run, branch, table)
    training = {
        f"training, line of {branch}": kept,
        "training of the guide, rolled back": scout,
        "training, abandoned": abandoned,
    }
    sampling = {
        "scoring of candidates": "score",
        "probes": "probe",
        "guide caches": "guide_cache",
        "acceptance tests": "acceptance_test",
        "calibration": "calibration",
    }
    costs = training | {label: table.kinds.get(kind, ZERO_COST) for label, kind in sampling.items()}
    for label, cost in costs.items():
        yield _activity(label, cost, has_steps=label in training)
    yield _activity("total", sum(costs.values(), start=ZERO_COST), has_steps=True)
    yield _activity("held-out evaluation (not counted)", table.kinds.get("evaluate", ZERO_COST), has_steps=False)


def _activity(label: str, cost: Cost, *, has_steps: bool) -> ActivityCost:
    steps = cost.steps if has_steps else None
    return ActivityCost(activity=label, steps=steps, tokens=cost.tokens, seconds=cost.seconds)
