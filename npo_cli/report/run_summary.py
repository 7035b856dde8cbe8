"""One run in words: what was trained, its best checkpoint, what each branch brought and cost, whether it was worth it.

And the commands that make it again, from the recorded recipe, branches and guide caches.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npo_cli.config.recipe import SCOUT_FIXED, SCOUT_OVERRIDES
from npo_cli.errors import quote_path
from npo_cli.report.html import SummaryLine
from npo_cli.report.hysteresis import find_unguided_branch
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.bench_dir import load_commands
from npo_cli.storage.checkpoints import list_checkpoints
from npo_cli.storage.cost_sums import (
    best_held_cost_to_threshold,
    best_held_curve,
    compute_run_costs,
    cost_to_threshold,
    learning_curve,
    merge_cost_lines,
    neighbour_means,
    spread_thresholds,
)
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.index import select_best_evals, select_line_evals
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry, find_first_segment, list_branches, list_result_branches
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.sample_store import read_all_scores
from npo_cli.storage.scouts import list_scout_uses
from npo_cli.types.costs import CostToThreshold, CurvePoint
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import EvalReport, Segment


def summarize_in_words(run: RunDir, branch: str) -> Iterator[SummaryLine]:
    """The summary that a report begins with; `branch` is the one that leads."""
    yield SummaryLine(label="Trained", text=describe_training(run, branch))
    yield SummaryLine(label="Best checkpoint", text=describe_best_checkpoint(run))
    for name in list_branches(run):
        yield SummaryLine(label=f"Branch {name}", text=describe_branch(run, name))
    yield SummaryLine(label="Worth it?", text=describe_worth(run, branch))


def describe_training(run: RunDir, branch: str) -> str:
    """Model, task, recipe, and everything that was executed."""
    recipe, spent, names = run.read_recipe(branch), compute_run_costs(run, branch), list_result_branches(run)
    model, task, train = (get_section(recipe, name) for name in ("model", "task", "train"))
    data = task.get("path") or task.get("source", "-")
    branches = f"{len(names)} branch{'es' * (len(names) != 1)}"
    return (
        f"{model.get('path') or 'the embedded model'} on {data}, recipe {recipe.get('name', '-')}, "
        f"seed {train.get('seed', '-')}, learning rate {train.get('lr', '-')}. {branches}, "
        f"{spent.updates:,} updates, {spent.tokens:,} generated tokens and {spent.seconds:,.0f} s in all, "
        "with rolled-back and rejected work."
    )


def get_section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a recipe; empty where it is missing."""
    found = recipe.get(name)
    return found if isinstance(found, Mapping) else {}


def describe_best_checkpoint(run: RunDir) -> str:
    """The highest held-out accuracy of all saved checkpoints, with the folder that `from_pretrained` opens."""
    evals = {
        (name, step): report for name in list_branches(run) for step, report in select_line_evals(run, name).items()
    }
    if not evals:
        return f"no checkpoint has been evaluated: npo eval {quote_path(run.root)} --all"
    best = max(evals.values(), key=_rank)
    saved = {(one.branch, one.step): one.path for name in list_branches(run) for one in list_checkpoints(run, name)}
    kept = [report for report in evals.values() if (report.branch, report.step) in saved]
    if not kept:
        return f"{_describe_accuracy(best)}; no evaluated checkpoint is still saved."
    found = max(kept, key=_rank)
    text = f"{_describe_accuracy(found)}, in {quote_path(saved[found.branch, found.step])}"
    if (best.branch, best.step) != (found.branch, found.step):
        text += f". Higher but not saved: {_describe_accuracy(best)}"
    return f"{text}."


def _rank(report: EvalReport) -> tuple[float, int]:
    return report.accuracy, -report.step


def _describe_accuracy(report: EvalReport) -> str:
    interval = f"[{report.accuracy_low:.3f}, {report.accuracy_high:.3f}]"
    return f"held-out accuracy {report.accuracy:.3f} {interval} at step {report.step} of {report.branch}"


def describe_branch(run: RunDir, name: str) -> str:
    """Where it began, with which guide, from which accuracy to which, and what that cost."""
    first, points = find_first_segment(run, name), learning_curve(run, name, name=name)
    last = max((row["step"] for row in read_metrics(run, name)), default=first.fork_step)
    if first.is_scout:
        return describe_scout(run, first, last)
    text = f"{_describe_origin(run, first)}, to step {last}"
    if not points:
        return f"{text}; not evaluated."
    best = max(points, key=lambda point: (point.accuracy, -point.step))
    own = [point for point in points if point.step >= first.fork_step] or points
    gain = f"accuracy {own[0].accuracy:.3f} at step {own[0].step}, best {best.accuracy:.3f} at step {best.step}"
    end = points[-1]
    needed = ", its guide and the steps rolled back for it included" if first.parent is not None else ""
    return f"{text}: {gain}; cost: {end.total_tokens:,} tokens in {end.total_steps:,} steps{needed}."


def describe_scout(run: RunDir, first: Segment, last: int) -> str:
    """Where a scout began, what used it, and what it cost."""
    uses = ", ".join(map(str, list_scout_uses(run, first.branch))) or "nothing so far"
    kept = "" if list_checkpoints(run, first.branch) else "; its checkpoints were dropped"
    steps = [one for one in merge_cost_lines(run) if one.kind == "train" and one.branch == first.branch]
    return (
        f"a disposable scout from {first.parent} at step {first.fork_step} to step {last}, used by {uses}{kept}; cost: "
        f"{sum(one.tokens for one in steps):,} tokens in {len(steps):,} steps."
    )


def _describe_origin(run: RunDir, first: Segment) -> str:
    if first.parent is None:
        return "trained without a guide from step 0"
    where = f"{first.parent} at step {first.fork_step}"
    caches = {info.name: info for info in list_guide_caches(run)}
    info = caches.get(first.guide_cache or "")
    if first.merge_spec:
        return f"forked from {where} with a merged start ({first.merge_spec})"
    if first.guide_cache is None:
        return f"forked from {where} without a guide"
    source = f" ({info.source.text})" if info else ""
    until = f" until step {first.guide_until}" if first.guide_until is not None else ""
    return f"forked from {where} with guide {first.guide_cache}{source}{until}"


MAX_JUDGED = 3
"""Branches with a guide that are judged in words; all are in the table of costs."""


def describe_worth(run: RunDir, branch: str) -> str:
    """Of `branch` first, and of every other last branch with a guide, whether the guide was worth it."""
    guided = [name for name in list_result_branches(run) if find_unguided_branch(run, name) != name]
    replaced = {find_first_segment(run, name).parent for name in guided} - {branch}
    last = sorted((name for name in guided if name not in replaced), key=lambda name: name != branch)
    if not last:
        return (
            "no branch has a guide, so there is nothing to compare. "
            f"Next: npo score-checkpoints {quote_path(run.root)} --at STEP"
        )
    more = f" {len(last) - MAX_JUDGED} more branches are in the table of costs." if len(last) > MAX_JUDGED else ""
    return " ".join(_describe_branch_worth(run, name) for name in last[:MAX_JUDGED]) + more


def _describe_branch_worth(run: RunDir, branch: str) -> str:
    """By total tokens: the branch, and the best policy that it had paid for, against the line without a guide."""
    baseline = find_unguided_branch(run, branch)
    points, unguided = (learning_curve(run, name, name=name) for name in (branch, baseline))
    again = f"npo compare RUN_WITHOUT_A_GUIDE {quote_path(run.root)}:{branch}"
    if not points or not unguided:
        return f"Unknown: {baseline} or {branch} was never evaluated. npo eval {quote_path(run.root)} --all"
    levels = _common_thresholds(run, branch, points, unguided)
    if not levels:
        return (
            f"Cannot be said from this run: {branch} and {baseline} reached no accuracy in common after the guide "
            f"began to act. Compare with a run without a guide: {again}"
        )
    mine, ours = (cost_to_threshold(curve, levels[-1]) for curve in (points, unguided))
    text = f"{_judge(mine, ours)}, to an accuracy of {levels[-1]:g}: {_compare(mine, ours)}."
    held = best_held_curve(run, branch, name=branch)
    if held:
        best = best_held_cost_to_threshold(held, levels[-1])
        text += f" Best held, by any policy that {branch} had paid for: {_compare(best, ours)}."
    if unguided[-1].step < points[-1].step:
        text += (
            f" {baseline} ends at step {unguided[-1].step}, so nothing can be said of higher accuracies; "
            f"compare with a run without a guide: {again}"
        )
    return text


def _common_thresholds(
    run: RunDir, branch: str, points: Sequence[CurvePoint], unguided: Sequence[CurvePoint]
) -> tuple[float, ...]:
    """Accuracies that both reach, above that of the unguided line at the first guided fork."""
    guided = (find_first_segment(run, span.branch) for span in ancestry(run, branch))
    fork_step = min(first.fork_step for first in guided if first.guide_cache is not None)
    before = [mean for point, mean in neighbour_means(unguided) if point.step <= fork_step]
    best = min(max(mean for _, mean in neighbour_means(curve)) for curve in (points, unguided))
    return spread_thresholds(max(before, default=0.0), best)


def _judge(one: CostToThreshold, baseline: CostToThreshold) -> str:
    """`No by total tokens`."""
    ratio = _ratio(one, baseline)
    if ratio is None:
        return "Unknown by total tokens"
    return "Yes by total tokens" if ratio > 1 else "No by total tokens"


def _ratio(one: CostToThreshold, baseline: CostToThreshold) -> float | None:
    """Above 1: cheaper than the baseline. None where either did not reach the accuracy or paid nothing."""
    return baseline.total_tokens / one.total_tokens if one.total_tokens and baseline.total_tokens else None


def _compare(one: CostToThreshold, baseline: CostToThreshold) -> str:
    """`npo 316,589 total tokens, main 224,921, 0.71x; by step 60 and 100, 1.67x`."""
    ratio = _ratio(one, baseline)
    if ratio is None:
        return f"{one.name} did not reach it"
    text = f"{one.name} {one.total_tokens:,} total tokens, {baseline.name} {baseline.total_tokens:,}: {ratio:.2f}x"
    if one.is_best_held or not one.step or not baseline.step:
        return text
    return f"{text} ({baseline.step / one.step:.2f}x by step: {one.step} and {baseline.step})"


def find_best_accuracy(run: RunDir) -> float:
    """The highest held-out accuracy of any checkpoint; -1 without an evaluation."""
    return max((report.accuracy for report in select_best_evals(run).values()), default=-1.0)


# Commands

AGAIN = Path("again")
"""Run directory of the repetition in the commands."""


def list_commands(run: RunDir) -> list[str]:
    """Shell commands that make the run again in a new folder, from the recipe that it recorded."""
    target = quote_path(run.root.with_name(f"{run.root.name}-{AGAIN}"))
    recipe = quote_path(run.recipe_path())
    if read_transitions(run):
        return [f"npo train {recipe} {target} --autonpo"]
    caches = {info.name: info for info in list_guide_caches(run)}
    commands = [f"npo train {recipe} {target}{_until(run, list_branches(run)[0])}"]
    for name in list_branches(run)[1:]:
        first = find_first_segment(run, name)
        if first.is_scout:
            commands.append(_scout_command(run, target, first))
            continue
        commands += _score_commands(run, target, first)
        if first.guide_cache in caches:
            commands.append(_sample_command(target, caches[first.guide_cache]))
        guide = f"--guide {first.guide_cache}" if first.guide_cache else "--no-guide"
        merge = f" --merge {first.merge_spec}" if first.merge_spec else ""
        commands.append(
            f"npo resume {target}{_branch(first.parent)} --at {first.fork_step} {guide}{merge} --new-branch {name}"
            f"{_changes(run, first)}{_until(run, name)}"
        )
    return commands


def list_recorded_commands(runs: Sequence[RunDir]) -> list[str]:
    """What npo bench recorded of its runs, those of the first seed of each method; nothing for other runs."""
    found: list[str] = []
    shown: set[Path] = set()
    for run in runs:
        commands, method = load_commands(run.root.parent), run.root.parent.parent
        if commands and method not in shown:
            shown.add(method)
            found += [f"# {method.parent.name}, {run.root.parent.name}; other seeds: another train.seed"]
            found += [f"npo {shlex.join(command)}" for command in commands]
    return found


def _scout_command(run: RunDir, target: str, first: Segment) -> str:
    """With its settings as `scout.*` where a scout may have them otherwise, and as they are where a fork may."""
    own = _flatten(run.read_recipe(first.branch))
    names = {key: f"scout.{name}" for name, key in SCOUT_OVERRIDES.items()}
    made = {*SCOUT_FIXED, *names.values(), "scout.num_steps"}
    given = {
        names.get(key, key): value
        for key, value in _list_changes(run, first).items()
        if key not in made and not key.startswith("target.")
    }
    settings = "".join(f" {key}={shlex.quote(_to_text(value))}" for key, value in given.items())
    return (
        f"npo scout {target}{_branch(first.parent)} --at {first.fork_step} "
        f"--steps {own['train.num_steps'] - first.fork_step} --name {first.branch}{settings}"
    )


def _score_commands(run: RunDir, target: str, first: Segment) -> list[str]:
    """The scorings of the learner that the branch was forked from."""
    found = {}
    for result in read_all_scores(run):
        if (result.branch, result.learner_step) == (first.parent, first.fork_step):
            specs = [score.candidate for score in result.scores if score.source != "none"]
            sources = "".join(f" --source {shlex.quote(spec)}" for spec in specs)
            found[f"npo score-checkpoints {target}{_branch(first.parent)} --at {first.fork_step}{sources}"] = None
    return list(found)


def _sample_command(target: str, info: GuideCacheInfo) -> str:
    return (
        f"npo sample-guide {target}{_branch(info.branch)} --at {info.learner_step} "
        f"--source {shlex.quote(info.source.text)} --steps {info.num_steps} --name {info.name}"
    )


def _branch(name: str | None) -> str:
    return "" if name in (None, "main") else f" --branch {name}"


def _until(run: RunDir, name: str) -> str:
    """`--until N` where the branch ended before its recipe does."""
    planned = get_section(run.read_recipe(name), "train").get("num_steps")
    last = max((row["step"] for row in read_metrics(run, name)), default=None)
    return f" --until {last}" if last is not None and planned is not None and last < planned else ""


def _changes(run: RunDir, first: Segment) -> str:
    """Settings of the branch that its parent has otherwise, as KEY=VALUE."""
    return "".join(f" {key}={shlex.quote(_to_text(value))}" for key, value in _list_changes(run, first).items())


def _list_changes(run: RunDir, first: Segment) -> dict[str, Any]:
    own, parent = (_flatten(run.read_recipe(name)) for name in (first.branch, first.parent))
    return {key: value for key, value in own.items() if parent.get(key) != value}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _to_text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
