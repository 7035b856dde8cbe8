"""Sums of costs.jsonl.

`cumulative_costs` and `learning_curve` charge a branch with what it needed, by logical step; `best_held_curve` also
credits it with the policies that it paid for; `compute_run_costs` counts everything that the run executed;
`costs_by_activity` splits the same total by kind of work.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from npo_cli.scoring.hysteresis import Arrivals
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.costs import CostLine, costs_path, read_cost_lines, relative_artifact
from npo_cli.storage.files import cached_by_file
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.index import select_line_evals
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import (
    ancestry,
    find_first_segment,
    find_policy_owner,
    is_scout,
    list_branches,
    list_recorded_branches,
)
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.costs import ActivityCost, BestHeldPoint, CostToThreshold, CurvePoint, RunCosts
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
    teacher_tokens: int = 0
    """Response tokens that the teacher of a dense target read."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            forwards=self.forwards + other.forwards,
            updates=self.updates + other.updates,
            teacher_tokens=self.teacher_tokens + other.teacher_tokens,
        )


ZERO_COST = Cost(steps=0, tokens=0, seconds=0.0)
CHARGE_KINDS = ("acceptance_test", "guide_empty")
STARTUP_KINDS = ("save", "load", "start")
"""Seconds only."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """costs.jsonl with pieces that were executed again put together."""

    steps: dict[str, dict[int, Cost]] = field(default_factory=lambda: defaultdict(dict))
    """Training steps by branch and step."""
    at_step: dict[str, dict[int, Cost]] = field(default_factory=lambda: defaultdict(dict))
    """Probes, saved checkpoints, and batches sampled ahead after that step and not trained: paid from that step on."""
    after_step: dict[str, dict[int, Cost]] = field(default_factory=lambda: defaultdict(dict))
    """Loading and starting, in order to train on: paid from the next step on."""
    artifacts: dict[str, Cost] = field(default_factory=dict)
    """Everything spent on one artifact."""
    kinds: dict[str, Cost] = field(default_factory=dict)
    """Everything of one kind."""
    charges: tuple[CostLine, ...] = ()
    """Acceptance tests and guide caches without a response: what the branch that continues after them pays."""
    forks: dict[str, CostLine] = field(default_factory=dict)
    cumulative: dict[str, dict[int, Cost]] = field(default_factory=dict)
    """What `cumulative_costs` found, by branch: a line of descent is summed once, however many branches it has."""


def merge_cost_lines(run: RunDir) -> list[CostLine]:
    """costs.jsonl with pieces that were executed again put together: tokens of the last time, seconds of all."""
    merged: dict[tuple[str, str, int, str, str], CostLine] = {}
    for line in read_cost_lines(run):
        before = merged.get(line.key)
        merged[line.key] = line if before is None else replace(line, seconds=before.seconds + line.seconds)
    return list(merged.values())


def drop_trained_tokens(lines: Sequence[CostLine]) -> list[CostLine]:
    """Of batches that were sampled ahead only those keep their tokens that were not trained; the others have a step."""
    trained = {(line.branch, line.step) for line in lines if line.kind == "train"}
    return [
        replace(line, tokens=0, forwards=0) if line.kind == "ahead" and (line.branch, line.step) in trained else line
        for line in lines
    ]


@cached_by_file(costs_path)
def read_cost_table(run: RunDir) -> CostTable:
    """One pass over costs.jsonl."""
    lines = drop_trained_tokens(merge_cost_lines(run))
    table = CostTable(charges=tuple(line for line in lines if line.kind in CHARGE_KINDS))
    ahead: dict[str, list[tuple[int, Cost]]] = defaultdict(list)
    for line in lines:
        cost = Cost(
            steps=int(line.kind == "train"),
            tokens=line.tokens,
            seconds=line.seconds,
            forwards=line.forwards,
            updates=line.updates,
            teacher_tokens=line.teacher_tokens,
        )
        table.kinds[line.kind] = table.kinds.get(line.kind, ZERO_COST) + cost
        if line.artifact:
            table.artifacts[line.artifact] = table.artifacts.get(line.artifact, ZERO_COST) + cost
        if line.kind == "train":
            table.steps[line.branch][line.step] = cost
        elif line.kind == "ahead":
            ahead[line.branch] += [(line.step, cost)]
        elif line.kind == "fork":
            table.forks[line.branch] = line
        elif line.kind == "probe" or (line.kind in STARTUP_KINDS and not line.artifact):
            # A process starts, and step 0 is saved, in order to train on.
            is_after = line.kind in ("load", "start") or line.step == 0
            by_step = (table.after_step if is_after else table.at_step)[line.branch]
            by_step[line.step] = by_step.get(line.step, ZERO_COST) + cost
    for branch, sampled in ahead.items():
        for step, cost in sampled:
            last = max((known for known in table.steps[branch] if known < step), default=step)
            table.at_step[branch][last] = table.at_step[branch].get(last, ZERO_COST) + cost
    return table


def cost_at(run: RunDir, branch: str, step: int) -> Cost:
    """Everything spent for the branch to reach `step`."""
    return cumulative_costs(run, branch)[step]


def cumulative_costs(run: RunDir, branch: str, table: CostTable | None = None) -> dict[int, Cost]:
    """The same for every step of the branch's line of descent.

    A branch pays for its parent up to the fork; one with a guide also for the line up to the guide and the scored
    candidates, for the scoring, for the cache, for earlier caches for the same learner that found nothing, and for the
    scouts that it learns from. A probe
    is paid by the branch that was probed, a checkpoint by the branch that saved it, from that step on; an acceptance
    test by the branch that continues, from the next step on, with the replay where it was reverted, and so is a cache
    that AutoNPO found nothing for.
    """
    table = read_cost_table(run) if table is None else table
    if branch in table.cumulative:
        return table.cumulative[branch]
    first = find_first_segment(run, branch)
    parents = {0: ZERO_COST} if first.parent is None else cumulative_costs(run, first.parent, table)
    spent = fork_cost(run, first, table)
    known = {step: cost for step, cost in parents.items() if step <= first.fork_step}
    if first.merged_checkpoints:
        known[first.fork_step] = spent
    onward: dict[int, Cost] = defaultdict(lambda: ZERO_COST, table.after_step[branch])
    for line in table.charges:
        if line.branch == branch:
            charged = (_charged_cost(table, name) for name in line.charged)
            onward[line.step] += sum(charged, start=table.artifacts.get(line.artifact, ZERO_COST))
    spent += onward[first.fork_step] + table.at_step[branch].get(first.fork_step, ZERO_COST)
    for step, own in sorted(table.steps[branch].items()):
        spent = spent + own + table.at_step[branch].get(step, ZERO_COST)
        known[step] = spent
        # Reaching this step cost no more; going on from it does.
        spent = spent + onward[step]
    table.cumulative[branch] = known
    return known


def _charged_cost(table: CostTable, artifact: str) -> Cost:
    """What an artifact took; of a branch that is named by its folder its own steps, with what it saved and loaded."""
    kind, _, name = artifact.partition("/")
    spent = table.artifacts.get(artifact, ZERO_COST)
    if kind != "branches":
        return spent
    own = (each for by_step in (table.steps, table.at_step, table.after_step) for each in by_step[name].values())
    return sum(own, start=spent)


def fork_cost(run: RunDir, first: Segment, table: CostTable) -> Cost:
    """What a branch had cost before its first own step."""
    if first.parent is None:
        return ZERO_COST
    fork = table.forks.get(first.branch)
    line, last = (first.parent, first.fork_step) if fork is None or fork.until is None else fork.until
    charged = [] if fork is None else [_charged_cost(table, name) for name in fork.charged]
    merged = _merged_costs(run, first, table) if fork is None or fork.until is None else ()
    return sum((*charged, *merged), start=cumulative_costs(run, line, table)[last])


def _merged_costs(run: RunDir, first: Segment, table: CostTable) -> Iterator[Cost]:
    """What the merged checkpoints of a branch's start had cost, without what its parent paid."""
    assert first.parent is not None
    steps, artifacts = _paid_work(run, first.parent, first.fork_step, table)
    for branch, step in first.merged_checkpoints:
        more_steps, more_artifacts = _paid_work(run, branch, step, table)
        for owner, own in sorted(more_steps - steps):
            yield table.steps[owner][own] + table.at_step[owner].get(own, ZERO_COST)
        yield from (_charged_cost(table, name) for name in sorted(more_artifacts - artifacts))
        steps, artifacts = steps | more_steps, artifacts | more_artifacts


def _paid_work(run: RunDir, branch: str, last: int, table: CostTable) -> tuple[set[tuple[str, int]], set[str]]:
    """The training steps and the artifacts that a branch is charged with on its way to `last`."""
    steps, artifacts = set(), set()
    for line, end in [(branch, last), *_extra_lines(run, branch, table, last)]:
        for span in ancestry(run, line):
            own = (step for step in table.steps[span.branch] if span.contains(step) and (end is None or step <= end))
            steps |= {(span.branch, step) for step in own}
            artifacts |= set(table.forks[span.branch].charged) if span.branch in table.forks else set()
    return steps, artifacts


def learning_curve(run: RunDir, branch: str, *, name: str) -> list[CurvePoint]:
    """Held-out accuracy along the branch's line of descent, with its costs."""
    reports = select_line_evals(run, branch)
    entropies = {span.branch: _read_entropies(run, span.branch) for span in ancestry(run, branch)}
    costs = cost_at_steps(run, branch)
    return [
        CurvePoint(
            name=name,
            step=step,
            total_steps=cost.steps,
            total_tokens=cost.tokens,
            total_seconds=cost.seconds,
            total_forwards=cost.forwards,
            total_teacher_tokens=cost.teacher_tokens,
            accuracy=report.accuracy,
            entropy=entropies[report.branch].get(step),
        )
        for step, report in sorted(reports.items())
        for cost in costs[step]
    ]


@cached_by_file(RunDir.metrics_path)
def _read_entropies(run: RunDir, branch: str) -> Mapping[int, float]:
    """Of the steps that have one: the log of another trainer may lack it, and a number that is none is left out."""
    return {row["step"]: row["entropy"] for row in read_metrics(run, branch) if "entropy" in row}


def cost_at_steps(run: RunDir, branch: str) -> dict[int, list[Cost]]:
    """Cost of reaching each step; at a fork also the cost with guide and scoring paid and nothing learned yet."""
    table, first = read_cost_table(run), find_first_segment(run, branch)
    costs = {step: [cost] for step, cost in cumulative_costs(run, branch, table).items()}
    if first.parent is not None and not first.merged_checkpoints:
        costs[first.fork_step].append(fork_cost(run, first, table))
    return costs


def cost_to_threshold(points: Sequence[CurvePoint], threshold: float) -> CostToThreshold:
    """The first evaluation at which the mean of it and its two neighbours reaches the threshold.

    The ends have one neighbour. None in every field where the curve ends below: censored, not infinite.
    """
    reached = (point for point, mean in neighbour_means(points) if mean >= threshold)
    return _cost_to_threshold(next(reached, None), points, threshold)


def best_held_cost_to_threshold(held: Sequence[BestHeldPoint], threshold: float) -> CostToThreshold:
    """The first point of the best-held curve that reaches the threshold; None in every field where none does."""
    reached = next((point for point in held if point.accuracy >= threshold), None)
    return replace(_cost_to_threshold(reached, held, threshold), is_best_held=True)


def _cost_to_threshold(
    point: CurvePoint | BestHeldPoint | None, points: Sequence[CurvePoint | BestHeldPoint], threshold: float
) -> CostToThreshold:
    name = points[0].name if points else ""
    if point is None:
        return CostToThreshold(name=name, threshold=threshold, step=None, total_steps=None, total_tokens=None)
    return CostToThreshold(
        name=name,
        threshold=threshold,
        step=point.step,
        total_steps=point.total_steps,
        total_tokens=point.total_tokens,
        total_seconds=point.total_seconds,
        total_forwards=point.total_forwards,
        total_teacher_tokens=point.total_teacher_tokens,
    )


THRESHOLD_SHARES = (0.1, 0.65, 1.0)
"""Where in the range between start and best accuracy a threshold is taken, before it is rounded down."""
THRESHOLD_GRIDS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
GRID_CELLS = 5
"""A range has at least this many cells of its grid."""


def choose_thresholds(curves: Sequence[Sequence[CurvePoint]]) -> tuple[float, ...]:
    """Accuracies whose costs are worth a row: above the start of every curve and reached by at least one.

    The means of 3 evaluations decide, as in `cost_to_threshold`. Empty where no curve rises above its start.
    """
    means = [[mean for _, mean in neighbour_means(points)] for points in curves if points]
    if not means:
        return ()
    return spread_thresholds(max(some[0] for some in means), max(max(some) for some in means))


def spread_thresholds(start: float, best: float) -> tuple[float, ...]:
    """Up to three round numbers in (start, best], rising: 0.2, 0.6, 0.9 between 0.1 and 0.93."""
    span = best - start
    grid = next((grid for grid in THRESHOLD_GRIDS if span >= GRID_CELLS * grid), THRESHOLD_GRIDS[-1])
    first = int(start / grid + 1e-9) + 1
    cells = (max(first, int((start + share * span) / grid + 1e-9)) for share in THRESHOLD_SHARES)
    return tuple(dict.fromkeys(level for cell in cells if (level := round(cell * grid, 3)) <= best + 1e-9))


def find_arrivals(points: Sequence[CurvePoint], accuracy: float, target: float) -> Arrivals:
    """Steps at which a curve first reaches two accuracies."""
    first, last = (cost_to_threshold(points, threshold).step for threshold in (accuracy, target))
    return Arrivals(accuracy=first, target=last, last=points[-1].step)


def neighbour_means(points: Sequence[CurvePoint]) -> list[tuple[CurvePoint, float]]:
    """Every evaluated step, at its first cost, with the mean accuracy of it and its neighbours."""
    distinct = [point for index, point in enumerate(points) if index == 0 or point.step != points[index - 1].step]
    accuracies = [point.accuracy for point in distinct]
    near = (accuracies[max(0, index - 1) : index + 2] for index in range(len(distinct)))
    return [(point, sum(some) / len(some)) for point, some in zip(distinct, near, strict=True)]


def best_held_curve(run: RunDir, branch: str, *, name: str) -> list[BestHeldPoint]:
    """Best policy held so far: the branch is charged for its scout, so it may also use the scout's checkpoint. A
    disposable scout has none that is held.

    One point per improvement of max over policies paid for by then of the mean of 3 evaluations, which is that of
    `cost_to_threshold`. The policies: the branch's own line, the lines that its guides were trained on up to the last
    step that it is charged with, and replays that it is charged with because they were reverted. Empty where it is
    charged with no line but its own.
    """
    extra = list(_extra_lines(run, branch, read_cost_table(run), None))
    if not extra:
        return []
    found = sorted(
        (point for line, last in [(branch, None), *extra] for point in _line_points(run, line, name=name, last=last)),
        key=lambda point: (point.total_steps, point.total_tokens, point.total_seconds, -point.accuracy),
    )
    improved: list[BestHeldPoint] = []
    for point in found:
        if not improved or point.accuracy > improved[-1].accuracy:
            improved.append(point)
    return improved


def _extra_lines(run: RunDir, branch: str, table: CostTable, last: int | None) -> Iterator[tuple[str, int | None]]:
    """Lines of descent (branch, last step) besides its own that the branch is charged with on its way to `last`."""
    first, fork = find_first_segment(run, branch), table.forks.get(branch)
    yield from first.merged_checkpoints
    if first.parent is not None and (fork is None or fork.until is None):
        yield from _extra_lines(run, first.parent, table, first.fork_step)
    elif fork is not None and fork.until is not None:
        yield fork.until
        yield from _extra_lines(run, fork.until[0], table, fork.until[1])
    for line in table.charges:
        if line.branch == branch and (last is None or line.step < last):
            folders = (artifact.partition("/") for artifact in line.charged)
            yield from ((name, None) for kind, _, name in folders if kind == "branches")


def _line_points(run: RunDir, branch: str, *, name: str, last: int | None = None) -> Iterator[BestHeldPoint]:
    points, line = learning_curve(run, branch, name=name), ancestry(run, branch)
    for point, mean in neighbour_means([point for point in points if last is None or point.step <= last]):
        yield BestHeldPoint(
            name=name,
            policy_branch=find_policy_owner(line, point.step) or branch,
            step=point.step,
            total_steps=point.total_steps,
            total_tokens=point.total_tokens,
            total_seconds=point.total_seconds,
            total_forwards=point.total_forwards,
            total_teacher_tokens=point.total_teacher_tokens,
            accuracy=mean,
        )


def compute_run_costs(run: RunDir, branch: str) -> RunCosts:
    """Updates, tokens and seconds of the whole run; only which steps count as abandoned depends on the branch."""
    table, moves = read_cost_table(run), read_transitions(run)
    training = split_training(run, branch, table)
    counted = [cost for kind, cost in table.kinds.items() if kind != "evaluate"]
    unused = list_unused_guides(run, table)
    return RunCosts(
        branch=branch,
        step=last_step(run, branch, table),
        updates=sum(cost.updates for cost in counted),
        training_tokens=training.kept.tokens,
        probe_tokens=table.kinds.get("probe", ZERO_COST).tokens,
        guide_tokens=sum(table.kinds.get(kind, ZERO_COST).tokens for kind in ("guide_cache", "score")),
        acceptance_test_tokens=table.kinds.get("acceptance_test", ZERO_COST).tokens,
        calibration_tokens=table.kinds.get("calibration", ZERO_COST).tokens,
        scout_tokens=training.scouts.tokens,
        abandoned_tokens=sum(part.tokens for part in (training.rolled_back, training.abandoned))
        + table.kinds.get("ahead", ZERO_COST).tokens,
        seconds=sum(cost.seconds for cost in counted),
        unused_guides=tuple(unused),
        unused_guide_tokens=sum(cost.tokens for cost in unused.values()),
        teacher_tokens=sum(cost.teacher_tokens for cost in counted),
        num_interventions=sum(
            move.event in ("rolled_back", "rung_applied") and not move.evidence.get("is_early") for move in moves
        ),
        num_rejections=sum(move.is_rejection for move in moves),
    )


def list_unused_guides(run: RunDir, table: CostTable) -> dict[str, Cost]:
    """Guide caches that no branch is charged with, by name, and what they cost."""
    forks = [table.forks[name] for name in list_branches(run) if name in table.forks]
    charged = {artifact for line in (*forks, *table.charges) for artifact in line.charged}
    folders = {info.name: relative_artifact(run, run.guide_folder(info.name)) for info in list_guide_caches(run)}
    return {name: table.artifacts.get(folder, ZERO_COST) for name, folder in folders.items() if folder not in charged}


def last_step(run: RunDir, branch: str, table: CostTable) -> int:
    """The newest step on the branch's line of descent."""
    steps = (step for span in ancestry(run, branch) for step in table.steps[span.branch] if span.contains(step))
    return max(steps, default=find_first_segment(run, branch).fork_step)


class TrainingSplit(NamedTuple):
    """All training of a run, seen from one branch."""

    kept: Cost
    """On its line of descent."""
    rolled_back: Cost
    """Of its guides, on lines of descent that it left."""
    scouts: Cost
    """Of disposable scouts, whichever branch they were used by."""
    abandoned: Cost


def split_training(run: RunDir, branch: str, table: CostTable) -> TrainingSplit:
    """Each step in the first part that it fits."""
    line, guiding = {span.branch: span for span in ancestry(run, branch)}, list_guiding_steps(run, branch)
    parts = dict.fromkeys(TrainingSplit._fields, ZERO_COST)
    for owner in list_recorded_branches(run):
        disposable = is_scout(run, owner)
        for step, cost in table.steps[owner].items():
            if owner in line and line[owner].contains(step):
                part = "kept"
            elif (owner, step) in guiding:
                part = "rolled_back"
            else:
                part = "scouts" if disposable else "abandoned"
            parts[part] += cost
    return TrainingSplit(**parts)


def list_guiding_steps(run: RunDir, branch: str) -> set[tuple[str, int]]:
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
    split = split_training(run, branch, table)
    training = {
        f"training, line of {branch}": split.kept,
        "training of the guide, rolled back": split.rolled_back,
        **({"training of scouts": split.scouts} if split.scouts.steps else {}),
        "training, abandoned": split.abandoned,
    }
    sampling = {
        "scoring of candidates": "score",
        "probes": "probe",
        "guide caches": "guide_cache",
        "acceptance tests": "acceptance_test",
        "calibration": "calibration",
        "saving checkpoints": "save",
        "loading task and weights": "load",
        "starting processes and engines": "start",
    }
    if "ahead" in table.kinds:
        sampling = {"sampled ahead, not trained": "ahead"} | sampling
    costs = training | {label: table.kinds.get(kind, ZERO_COST) for label, kind in sampling.items()}
    for label, cost in costs.items():
        yield _activity(label, cost, has_steps=label in training)
    yield _activity("total", sum(costs.values(), start=ZERO_COST), has_steps=True)
    yield _activity("held-out evaluation (not counted)", table.kinds.get("evaluate", ZERO_COST), has_steps=False)


def _activity(label: str, cost: Cost, *, has_steps: bool) -> ActivityCost:
    steps = cost.steps if has_steps else None
    return ActivityCost(
        activity=label, steps=steps, tokens=cost.tokens, teacher_tokens=cost.teacher_tokens, seconds=cost.seconds
    )
