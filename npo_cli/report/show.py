"""`npo show`: records of a run, read and not computed."""

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from npo_cli.errors import NpoError, quote_path
from npo_cli.report.prompt_history import build_prompt_history, iter_visits, render_prompt_text
from npo_cli.storage.cost_sums import (
    best_held_cost_to_threshold,
    best_held_curve,
    choose_thresholds,
    compute_run_costs,
    cost_to_threshold,
    learning_curve,
)
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_main_branch, list_branches, list_result_branches, read_segments
from npo_cli.storage.metrics import list_trained_steps, read_metrics, read_timings
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.costs import BestHeldPoint, CostToThreshold, CurvePoint, RunCosts
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Segment, StepReport
from npo_cli.types.views import GroupView, PromptHistory, PromptVisit, RolloutView

ShowRecord = (
    StepReport
    | RolloutView
    | GroupView
    | PromptHistory
    | PromptVisit
    | GuideCacheInfo
    | Segment
    | CurvePoint
    | BestHeldPoint
    | CostToThreshold
    | RunCosts
)


def show_run(
    root: Path, what: str, *, branch: str | None, step: int | None, prompt_id: str | None, limit: int | None
) -> list[ShowRecord]:
    """The requested records, oldest first; with a limit the last of them. A filter that does not apply is an error.

    The history of a prompt keeps its first record, whatever the limit.
    """
    run = open_run(root)
    if branch is not None and branch not in list_branches(run):
        named = ", ".join(list_branches(run)) or "none yet"
        raise NpoError(f"{root} has no branch {branch!r}: {named}", f"npo show {quote_path(root)} lineage")
    if what in ("guides", "lineage", "costs") and step is not None:
        raise NpoError(f"--step does not apply to {what}", f"npo show {quote_path(root)} {what}")
    if what not in ("rollouts", "groups") and prompt_id is not None:
        raise NpoError(
            f"--prompt does not apply to {what}",
            f"npo show {quote_path(root)} rollouts --prompt {shlex.quote(prompt_id)}",
        )
    match what:
        case "metrics":
            lines: Iterable[ShowRecord] = show_metrics(run, branch=branch, step=step)
        case "rollouts" if prompt_id is not None and step is None:
            lines = show_prompt_history(run, branch=branch, prompt_id=prompt_id)
        case "rollouts":
            lines = show_rollouts(run, branch=branch, step=step, prompt_id=prompt_id)
        case "groups":
            lines = show_groups(run, branch=branch, step=step, prompt_id=prompt_id)
        case "costs":
            lines = show_costs(run, branch=branch)
        case "guides":
            lines = show_guides(run, branch=branch)
        case _:
            lines = show_lineage(run, branch=branch)
    found = list(lines)
    if not found and (step is not None or prompt_id is not None):
        filters = [f"step {step}"] * (step is not None) + [f"prompt {prompt_id!r}"] * (prompt_id is not None)
        raise NpoError(f"{root} has no {what} of {' and '.join(filters)}", f"npo show {quote_path(root)} {what}")
    head = found[:1] if found and isinstance(found[0], PromptHistory) else []
    return found if limit is None else [*head, *found[len(head) :][-limit:]]


def show_metrics(run: RunDir, *, branch: str | None, step: int | None) -> Iterator[StepReport]:
    """Every step of one branch or of all. Of a step executed twice, the newest timings."""
    for name in list_branches(run) if branch is None else (branch,):
        timings = {row.get("step"): _numbers(row) for row in read_timings(run, name)}
        for row in read_metrics(run, name):
            if step in (None, row["step"]):
                spent = timings.get(row["step"], {})
                yield StepReport(branch=name, step=row["step"], metrics=_numbers(row), timings=spent)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def show_groups(run: RunDir, *, branch: str | None, step: int | None, prompt_id: str | None) -> Iterator[GroupView]:
    """Groups of one step, by default the newest. A prompt without a step: all steps."""
    name = branch or find_main_branch(run)
    log = RolloutLog(run.rollouts_path(name))
    if step is None and prompt_id is None:
        step = max(list_trained_steps(run, name, log), default=None)
    for at, group in log.iter_groups(step=step, prompt_id=prompt_id):
        yield GroupView(branch=name, step=at, group=group)


def show_rollouts(run: RunDir, *, branch: str | None, step: int | None, prompt_id: str | None) -> Iterator[RolloutView]:
    """Every rollout of those groups, injected ones included."""
    for line in show_groups(run, branch=branch, step=step, prompt_id=prompt_id):
        prompt = line.group.prompt
        for rollout in line.group.rollouts:
            yield RolloutView(
                branch=line.branch,
                step=line.step,
                prompt_text=render_prompt_text(prompt),
                reference_answer=prompt.answer,
                rollout=rollout,
            )


def show_prompt_history(run: RunDir, *, branch: str | None, prompt_id: str) -> Iterator[PromptHistory | PromptVisit]:
    """One prompt through training, across the branches of the lineage; nothing if it was never visited."""
    name = branch or find_main_branch(run)
    seen = list(iter_visits(run, name, prompt_id=prompt_id))
    if seen:
        yield build_prompt_history(name, seen)
        yield from seen


def show_guides(run: RunDir, *, branch: str | None) -> list[GuideCacheInfo]:
    """Guide caches, for one branch or all."""
    return [info for info in list_guide_caches(run) if branch in (None, info.branch)]


def show_costs(run: RunDir, *, branch: str | None) -> Iterator[CurvePoint | BestHeldPoint | CostToThreshold | RunCosts]:
    """Held-out accuracy of each branch with its costs, the best policy held by then, the costs of reaching
    accuracies chosen from the data, and the costs of the run.

    The last are seen from the branch, or from main.
    """
    names = list_result_branches(run) if branch is None else [branch]
    curves = [learning_curve(run, name, name=name) for name in names]
    for points in curves:
        yield from points
    held = {name: best_held_curve(run, name, name=name) for name in names}
    for best in held.values():
        yield from best
    for threshold in choose_thresholds(curves):
        for points in curves:
            if points:
                yield cost_to_threshold(points, threshold)
                if held[points[0].name]:
                    yield best_held_cost_to_threshold(held[points[0].name], threshold)
    if names:
        yield compute_run_costs(run, branch or find_main_branch(run))


def show_lineage(run: RunDir, *, branch: str | None) -> list[Segment]:
    """Segments of training, oldest first."""
    return [segment for segment in read_segments(run) if branch in (None, segment.branch)]
