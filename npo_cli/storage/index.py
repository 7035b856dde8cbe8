"""`npo index`: the table of a run's checkpoints, computed from the other files and not stored."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.storage.checkpoints import (
    PARTIAL_SUFFIX,
    TRAINING_STATE_FOLDER,
    check_recorded_logs,
    has_intact_training_state,
    has_intact_weights,
    read_manifest,
)
from npo_cli.storage.evals import read_evals
from npo_cli.storage.files import cached_by_file
from npo_cli.storage.layout import RunDir, open_run, parse_step
from npo_cli.storage.lineage import (
    ancestry,
    check_branch,
    find_first_segment,
    find_main_branch,
    find_policy_branch,
    find_policy_owner,
    list_branches,
)
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.sample_store import read_all_scores
from npo_cli.types.rollouts import CheckpointEntry, EvalReport
from npo_cli.types.scores import CandidateScore

BranchStep = tuple[str, int]
"""Branch and step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMeasurements:
    """Metrics of checkpoints from logs and scorings, by branch and step."""

    scores: dict[BranchStep, tuple[int, CandidateScore]]
    """Step of the learner, and the newest score for it."""
    evals: Mapping[BranchStep, EvalReport]
    """The evaluation with the most samples."""


def build_index(run: RunDir) -> list[CheckpointEntry]:
    """Every checkpoint by branch and step. One is complete if its files have their sizes; `npo verify` reads them."""
    check_recorded_logs(run)
    known = CheckpointMeasurements(scores=collect_newest_scores(run), evals=select_best_evals(run))
    entries = []
    for branch in list_branches(run):
        measured = {row.get("step"): row for row in read_metrics(run, branch)}
        parent = _fork_point(run, branch)
        for step, folder in list_checkpoint_folders(run.checkpoints_folder(branch)):
            fields = _on_disk(run, folder) | _measurements((branch, step), measured.get(step, {}), known)
            if not folder.is_dir():
                # Renamed or removed by its writer in the meantime.
                continue
            entries.append(CheckpointEntry(branch=branch, step=step, parent=parent, **fields))
            if fields["complete"]:
                parent = f"{branch}:{step}"
    return entries


def list_checkpoint_folders(home: Path) -> list[tuple[int, Path]]:
    """Folders of a branch that are a complete or unfinished checkpoint, by step."""
    found = []
    for folder in home.iterdir() if home.is_dir() else ():
        hidden = folder.name.startswith(".") and folder.name.endswith(PARTIAL_SUFFIX)
        step = parse_step(folder.name[1 : -len(PARTIAL_SUFFIX)] if hidden else folder.name)
        if step is not None:
            found.append((step, folder))
    return sorted(found)


def _on_disk(run: RunDir, folder: Path) -> dict[str, Any]:
    """Fields of an entry that come from the folder itself."""
    has_state = (folder / TRAINING_STATE_FOLDER).is_dir()
    intact = has_intact_weights(folder) and (not has_state or has_intact_training_state(folder))
    complete = intact and not folder.name.startswith(".")
    return {
        "tier": "full" if has_state else "weights",
        "size_bytes": measure_size(folder),
        "complete": complete,
        "digest": _digest(folder) if complete else None,
        "path": folder.relative_to(run.root).as_posix(),
    }


def measure_size(folder: Path | str) -> int:
    """Bytes of its files; those that a writer removes meanwhile are not counted."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            total += measure_size(entry.path) if entry.is_dir() else entry.stat().st_size
    return total


def _digest(folder: Path) -> str | None:
    return read_manifest(folder).get("digest")


def _measurements(place: BranchStep, measured: dict[str, Any], known: CheckpointMeasurements) -> dict[str, Any]:
    """Fields of an entry from the metrics of the step, evaluations and scorings."""
    report = known.evals.get(place)
    at, score = known.scores.get(place, (None, None))
    return {
        "reward": measured.get("reward"),
        "entropy": measured.get("entropy"),
        "accuracy": report.accuracy if report else None,
        "quality": score.quality if score else None,
        "variance": score.variance if score else None,
        "signal": score.signal if score else None,
        "learner_step": at,
    }


def _fork_point(run: RunDir, branch: str) -> str | None:
    """The checkpoint that a branch was forked from; None for the first branch."""
    first = find_first_segment(run, branch)
    if first.parent is None:
        return None
    return f"{find_policy_branch(run, first.parent, first.fork_step)}:{first.fork_step}"


def collect_newest_scores(run: RunDir) -> dict[BranchStep, tuple[int, CandidateScore]]:
    """The newest score of every scored candidate, with the learner's step."""
    newest: dict[BranchStep, tuple[int, CandidateScore]] = {}
    for answer in read_all_scores(run):
        for score in answer.scores:
            if score.step is not None and score.step > answer.learner_step:
                newest[find_policy_branch(run, answer.branch, score.step), score.step] = (answer.learner_step, score)
    return newest


@cached_by_file(lambda run: run.evals_path)
def select_best_evals(run: RunDir) -> Mapping[BranchStep, EvalReport]:
    """The evaluation with the most samples of every checkpoint evaluated; of several the newest."""
    best: dict[BranchStep, EvalReport] = {}
    for report in read_evals(run):
        place = (report.branch, report.step)
        if place not in best or count_eval_samples(report) >= count_eval_samples(best[place]):
            best[place] = report
    return best


def select_line_evals(run: RunDir, branch: str) -> dict[int, EvalReport]:
    """The same along the branch's line of descent, by step in the order evaluated."""
    line = ancestry(run, branch)
    return {
        step: report
        for (owner, step), report in select_best_evals(run).items()
        if find_policy_owner(line, step) == owner
    }


def find_best_branch(run: RunDir) -> str:
    """The branch with the highest held-out accuracy at a step of its own, of equal ones the older; main without any."""
    main, evals = find_main_branch(run), select_best_evals(run).values()
    best = dict.fromkeys(list_branches(run), -1.0)
    for report in evals:
        if report.branch in best:
            best[report.branch] = max(report.accuracy, best[report.branch])
    return max(best, key=best.__getitem__) if evals else main


def count_eval_samples(report: EvalReport) -> int:
    """Responses behind an evaluation."""
    return report.num_prompts * report.num_samples


def index_run(root: Path, *, branch: str | None = None) -> list[CheckpointEntry]:
    """Checkpoints of a branch, or of all."""
    run = open_run(root)
    if branch is not None:
        check_branch(run, branch)
    return [entry for entry in build_index(run) if branch in (None, entry.branch)]
