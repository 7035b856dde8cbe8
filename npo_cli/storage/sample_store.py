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

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.storage.files import decode_record, encode_record, now_utc, read_json, to_row, write_json_atomic
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.types.guides import SourceScore
from npo_cli.types.rollouts import CheckpointScore, EvalReport

KEY_LENGTH = 8
SCREENING_INDEX = -1
"""Arm number of the first look, which decides who is asked at all; other sources than checkpoints lie below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringSpec:
    """What settings.json says."""

    branch: str
    learner_step: int
    candidates: tuple[int, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedScores:
    """What scores.json says."""

    saved_at: str
    scores: tuple[Mapping[str, Any], ...]


@dataclass(slots=True)
class SampleStore:
    """One question: which of these candidates guides this learner best? Samples grow; scores are replaced whole."""

    folder: Path
    branch: str
    learner_step: int
    """Step of the learner."""
    candidates: tuple[int, ...]
    """Steps of the candidate guides."""
    settings: Mapping[str, Any]
    """Everything else that decides what is sampled."""
    samples: JsonlLog = field(init=False)

    def __post_init__(self) -> None:
        self.samples = JsonlLog(self.folder / "samples.jsonl")

    @property
    def scores_path(self) -> Path:
        """The answer; absent while the scoring is unfinished."""
        return self.folder / "scores.json"

    @property
    def is_finished(self) -> bool:
        """Whether scores were saved."""
        return self.scores_path.exists()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSet:
    """The saved answer of one scoring."""

    branch: str
    learner_step: int
    saved_at: str
    """ISO 8601, UTC, to the microsecond."""
    folder: Path
    scores: tuple[CheckpointScore, ...]


def open_sample_store(
    run: RunDir, branch: str, learner_step: int, *, candidates: Sequence[int], settings: Mapping[str, Any]
) -> SampleStore:
    """The folder of this scoring, made or found again by its learner, candidates and settings."""
    question = {
        "branch": branch,
        "learner_step": learner_step,
        "candidates": sorted(candidates),
        "settings": dict(settings),
    }
    canonical = json.dumps(json.loads(encode_record(question)), sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(canonical.encode("ascii")).hexdigest()[:KEY_LENGTH]
    folder = run.score_folder(branch, learner_step, key=key)
    if not (folder / "settings.json").exists():
        write_json_atomic(folder / "settings.json", question)
    return _scoring_in(folder)


def _scoring_in(folder: Path) -> SampleStore:
    path = folder / "settings.json"
    said = decode_record(ScoringSpec, read_json(path), path)
    return SampleStore(
        folder=folder,
        branch=said.branch,
        learner_step=said.learner_step,
        candidates=tuple(said.candidates),
        settings=said.settings,
    )


def list_sample_stores(run: RunDir) -> list[SampleStore]:
    """Every scoring, unfinished ones included, by folder name."""
    if not run.scores_folder.is_dir():
        return []
    folders = sorted(run.scores_folder.iterdir())
    return [_scoring_in(folder) for folder in folders if (folder / "settings.json").exists()]


@on_main_rank
def delete_sample_store(scoring: SampleStore) -> None:
    """Forget a scoring that has no answer: kept, it would for ever protect its candidates from retention."""
    shutil.rmtree(scoring.folder)


def save_scores(store: SampleStore, scores: Sequence[CheckpointScore], *, sources: Sequence[SourceScore] = ()) -> None:
    """Write the answer, one object a candidate; the scoring is finished. `sources`: all that was compared, if more."""
    store.samples.sync()
    rows = [json.loads(encode_record(score)) for score in scores]
    head = {"branch": store.branch, "learner_step": store.learner_step, "saved_at": now_utc(microseconds=True)}
    more = {"sources": [json.loads(encode_record(source)) for source in sources]} if sources else {}
    write_json_atomic(store.scores_path, {**head, "scores": rows, **more})


def read_all_scores(run: RunDir) -> list[ScoreSet]:
    """Every finished scoring, oldest answer first."""
    found = [_scores_in(scoring) for scoring in list_sample_stores(run) if scoring.is_finished]
    return sorted(found, key=lambda answer: answer.saved_at)


def _scores_in(scoring: SampleStore) -> ScoreSet:
    said = decode_record(SavedScores, read_json(scoring.scores_path), scoring.scores_path)
    scores = tuple(decode_record(CheckpointScore, row, scoring.scores_path) for row in said.scores)
    return ScoreSet(
        branch=scoring.branch,
        learner_step=scoring.learner_step,
        saved_at=said.saved_at,
        folder=scoring.folder,
        scores=scores,
    )


def find_latest_scores(run: RunDir, *, branch: str | None = None, learner_step: int | None = None) -> ScoreSet | None:
    """The newest answer, where asked of one branch or learner only; None if there is none."""
    found = [
        answer
        for answer in read_all_scores(run)
        if (branch is None or answer.branch == branch) and (learner_step is None or answer.learner_step == learner_step)
    ]
    return found[-1] if found else None


def append_eval(run: RunDir, report: EvalReport) -> None:
    """Record a held-out evaluation. The same report again (a resumed run) leaves no second line."""
    journal = JsonlLog(run.evals_path)
    journal.append_once(to_row(report), tuple(asdict(report)))


def read_evals(run: RunDir) -> list[EvalReport]:
    """Every held-out evaluation, oldest first."""
    return JsonlLog(run.evals_path).read_records(EvalReport)
