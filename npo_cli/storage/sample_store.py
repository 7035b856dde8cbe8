"""Stores of verified samples: a scoring of guide candidates, or an AutoNPO probe. Also saved scores and evaluations.

A store is a folder named after its branch, step and a key of its settings, so that the same command finds its samples
again and another one never mixes with them: settings.json and rollouts.jsonl, one line per chunk of sampled prompts.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.storage.files import (
    damaged_file_error,
    decode_record,
    encode_record,
    now_utc,
    read_json,
    to_row,
    write_json_atomic,
)
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, format_step, validate_name
from npo_cli.storage.rollout_log import decode_rollout, encode_rollout
from npo_cli.types.rollouts import EvalReport, Group, Rollout
from npo_cli.types.scores import CandidateScore

KEY_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """What settings.json says."""

    branch: str
    step: int
    """Step of the learner of a scoring, or of the probed policy."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the line's checkpoints that are sampled, which retention keeps until the store is finished."""
    settings: Mapping[str, Any]
    """Everything else that determines the samples; a scoring's candidates are among it."""


@dataclass(frozen=True, slots=True)
class SampleStore:
    """Samples of one or several policies, which only grow; the chunks of a killed process are all kept.

    A guide cache is such a store with a manifest too (`append` its rounds with the source's SPEC as candidate).
    """

    folder: Path
    spec: StoreSettings

    @property
    def _log(self) -> JsonlLog:
        return JsonlLog(self.folder / "rollouts.jsonl")

    @property
    def scores_path(self) -> Path:
        """Scores of the candidates; absent until a scoring is finished."""
        return self.folder / "scores.json"

    @property
    def is_finished(self) -> bool:
        """Whether scores were saved."""
        return self.scores_path.exists()

    def append(self, candidate: str, groups: Sequence[Group]) -> None:
        """Add a chunk of a candidate's groups as one line: it is on disk whole or not at all."""
        rows = [
            {"prompt_id": group.prompt.prompt_id, "rollouts": [encode_rollout(rollout) for rollout in group.rollouts]}
            for group in groups
        ]
        self._log.append({"candidate": candidate, "groups": rows})

    def read(self) -> dict[tuple[str, str], tuple[Rollout, ...]]:
        """All rollouts by (candidate, prompt id), in the order sampled."""
        samples: dict[tuple[str, str], tuple[Rollout, ...]] = {}
        for number, row in enumerate(self._log.iter_rows(), start=1):
            source = f"{self.folder / 'rollouts.jsonl'}, line {number}"
            try:
                for group in row["groups"]:
                    rollouts = tuple(decode_rollout(rollout, source) for rollout in group["rollouts"])
                    samples[row["candidate"], group["prompt_id"]] = rollouts
            except (KeyError, TypeError) as error:
                raise damaged_file_error(source, "a line is not a chunk of groups") from error
        return samples

    def count_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(rollout.num_tokens for rollouts in self.read().values() for rollout in rollouts)

    def sync(self) -> None:
        """Force every line down to the disk."""
        self._log.sync()

    @on_main_rank
    def delete(self) -> None:
        """Remove an unfinished store, whose checkpoints would otherwise never be deleted."""
        shutil.rmtree(self.folder)


@on_main_rank
def open_sample_store(
    parent: Path, branch: str, step: int, *, settings: Mapping[str, Any], checkpoints: Sequence[int] = ()
) -> SampleStore:
    """Create the store, or find it again by its branch, step, checkpoints and settings."""
    spec = {"branch": branch, "step": step, "checkpoints": sorted(checkpoints), "settings": dict(settings)}
    canonical = json.dumps(json.loads(encode_record(spec)), sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(canonical.encode("ascii")).hexdigest()[:KEY_LENGTH]
    folder = parent / f"{validate_name(branch)}_{format_step(step)}_{key}"
    if not (folder / "settings.json").exists():
        write_json_atomic(folder / "settings.json", spec)
    return _read_store(folder)


def list_sample_stores(parent: Path) -> list[SampleStore]:
    """Every store in a folder such as RUN/scores, unfinished ones included, by folder name."""
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    return [_read_store(folder) for folder in folders if (folder / "settings.json").exists()]


def _read_store(folder: Path) -> SampleStore:
    path = folder / "settings.json"
    return SampleStore(folder=folder, spec=decode_record(StoreSettings, read_json(path), path))


# Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSet:
    """The saved scores of one learner's candidates."""

    branch: str
    learner_step: int
    saved_at: str
    """ISO 8601, UTC, to the microsecond."""
    folder: Path
    scores: tuple[CandidateScore, ...]


def save_scores(store: SampleStore, scores: Sequence[CandidateScore]) -> None:
    """Write scores.json; the scoring is then finished."""
    store.sync()
    head = {
        "branch": store.spec.branch,
        "learner_step": store.spec.step,
        "saved_at": now_utc(microseconds=True),
    }
    write_json_atomic(store.scores_path, {**head, "scores": [json.loads(encode_record(score)) for score in scores]})


def read_all_scores(run: RunDir) -> list[ScoreSet]:
    """Every finished scoring, oldest first."""
    finished = [store for store in list_sample_stores(run.scores_folder) if store.is_finished]
    return sorted(map(_read_scores, finished), key=lambda found: found.saved_at)


def _read_scores(store: SampleStore) -> ScoreSet:
    path = store.scores_path
    row = read_json(path)
    rows = row.pop("scores", ()) if isinstance(row, dict) else ()
    scores = tuple(_decode_score(score, path) for score in rows)
    return replace(decode_record(ScoreSet, {**row, "folder": store.folder, "scores": ()}, path), scores=scores)


def _decode_score(row: dict[str, Any], source: Path) -> CandidateScore:
    score = decode_record(CandidateScore, row, source)
    return replace(score, best_for_variance_kinds=tuple(score.best_for_variance_kinds))


def find_latest_scores(run: RunDir, *, branch: str | None = None, learner_step: int | None = None) -> ScoreSet | None:
    """The newest scores, of one branch or learner if given; None if there are none."""
    found = [
        scores
        for scores in read_all_scores(run)
        if (branch is None or scores.branch == branch) and (learner_step is None or scores.learner_step == learner_step)
    ]
    return found[-1] if found else None


# Held-out evaluations


def append_eval(run: RunDir, report: EvalReport) -> None:
    """Record a held-out evaluation. The same report again, of a resumed run, adds no second line."""
    JsonlLog(run.evals_path).append_once(to_row(report), tuple(asdict(report)))


def read_evals(run: RunDir) -> list[EvalReport]:
    """Every held-out evaluation, oldest first."""
    return JsonlLog(run.evals_path).read_records(EvalReport)
