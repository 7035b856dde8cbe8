"""What was measured of checkpoints: Q, V and S of the candidate guides of a learner, and held-out evaluations.

A scoring has a folder named after its learner and a key of its settings, so that the same question asked again
finds its samples and another question never mixes with them.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npo_cli.guide_records import SourceScore
from npo_cli.records import CheckpointScore, EvalReport
from npo_cli.run_dir.files import build, encode, now_utc, read_json, row_of, write_json_atomic
from npo_cli.run_dir.journal import Journal
from npo_cli.run_dir.paths import RunDir

KEY_LENGTH = 8
PROBE = -1
"""Arm number of the first look, which decides who is asked at all; other sources than checkpoints lie below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What settings.json says."""

    branch: str
    at: int
    candidates: tuple[int, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What scores.json says."""

    saved: str
    scores: tuple[Mapping[str, Any], ...]


@dataclass(slots=True)
class Scoring:
    """One question: which of these candidates guides this learner best? Samples grow; scores are replaced whole."""

    folder: Path
    branch: str
    at: int
    """Step of the learner."""
    candidates: tuple[int, ...]
    """Steps of the candidate guides."""
    settings: Mapping[str, Any]
    """Everything else that decides what is sampled."""
    samples: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.samples = Journal(self.folder / "samples.jsonl")

    @property
    def scores_path(self) -> Path:
        """The answer; absent while the scoring is unfinished."""
        return self.folder / "scores.json"

    @property
    def finished(self) -> bool:
        """Whether scores were saved."""
        return self.scores_path.exists()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSet:
    """The saved answer of one scoring."""

    branch: str
    at: int
    saved: str
    """ISO 8601, UTC, to the microsecond."""
    folder: Path
    scores: tuple[CheckpointScore, ...]


def open_scoring(
    run: RunDir, branch: str, at: int, *, candidates: Sequence[int], settings: Mapping[str, Any]
) -> Scoring:
    """The folder of this scoring, made or found again by its learner, candidates and settings."""
    question = {"branch": branch, "at": at, "candidates": sorted(candidates), "settings": dict(settings)}
    canonical = json.dumps(json.loads(encode(question)), sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(canonical.encode("ascii")).hexdigest()[:KEY_LENGTH]
    folder = run.score_folder(branch, at, key=key)
    if not (folder / "settings.json").exists():
        write_json_atomic(folder / "settings.json", question)
    return _scoring_in(folder)


def _scoring_in(folder: Path) -> Scoring:
    path = folder / "settings.json"
    said = build(Question, read_json(path), path)
    return Scoring(
        folder=folder, branch=said.branch, at=said.at, candidates=tuple(said.candidates), settings=said.settings
    )


def scorings(run: RunDir) -> list[Scoring]:
    """Every scoring, unfinished ones included, by folder name."""
    if not run.scores_folder.is_dir():
        return []
    folders = sorted(run.scores_folder.iterdir())
    return [_scoring_in(folder) for folder in folders if (folder / "settings.json").exists()]


def drop_scoring(scoring: Scoring) -> None:
    """Forget a scoring that has no answer: kept, it would for ever protect its candidates from retention."""
    shutil.rmtree(scoring.folder)


def save_scores(scoring: Scoring, scores: Sequence[CheckpointScore], *, sources: Sequence[SourceScore] = ()) -> None:
    """Write the answer, one object a candidate; the scoring is finished. `sources`: all that was compared, if more."""
    scoring.samples.sync()
    rows = [json.loads(encode(score)) for score in scores]
    head = {"branch": scoring.branch, "at": scoring.at, "saved": now_utc(fine=True)}
    more = {"sources": [json.loads(encode(source)) for source in sources]} if sources else {}
    write_json_atomic(scoring.scores_path, {**head, "scores": rows, **more})


def all_scores(run: RunDir) -> list[ScoreSet]:
    """Every finished scoring, oldest answer first."""
    found = [_scores_in(scoring) for scoring in scorings(run) if scoring.finished]
    return sorted(found, key=lambda answer: answer.saved)


def _scores_in(scoring: Scoring) -> ScoreSet:
    said = build(Answer, read_json(scoring.scores_path), scoring.scores_path)
    scores = tuple(build(CheckpointScore, row, scoring.scores_path) for row in said.scores)
    return ScoreSet(branch=scoring.branch, at=scoring.at, saved=said.saved, folder=scoring.folder, scores=scores)


def latest_scores(run: RunDir, *, branch: str | None = None, at: int | None = None) -> ScoreSet | None:
    """The newest answer, where asked of one branch or learner only; None if there is none."""
    found = [
        answer
        for answer in all_scores(run)
        if (branch is None or answer.branch == branch) and (at is None or answer.at == at)
    ]
    return found[-1] if found else None


def append_eval(run: RunDir, report: EvalReport) -> None:
    """Record a held-out evaluation. The same report again (a resumed run) leaves no second line."""
    journal = Journal(run.evals_path)
    journal.append_once(row_of(report), tuple(asdict(report)))


def evals(run: RunDir) -> list[EvalReport]:
    """Every held-out evaluation, oldest first."""
    return Journal(run.evals_path).built(EvalReport)
