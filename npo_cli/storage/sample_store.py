"""Stores of verified samples: a scoring of guide candidates, an AutoNPO probe, a guide cache. Also saved scores.

A store is a folder with rollouts.jsonl, one line per chunk of sampled prompts. That of a scoring or a probe is named
after its branch, step and a key of its settings (settings.json), so that the same command finds its samples again and
another one never mixes with them; a guide cache has a name and guide.json (`guide_cache.py`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.storage.files import (
    check_time,
    damaged_file_error,
    decode_record,
    delete_atomically,
    encode_record,
    now_utc,
    read_json,
    to_row,
    write_json_atomic,
)
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, format_step, list_folders, validate_name
from npo_cli.storage.log_head import LogHead, check_log, encode_head
from npo_cli.storage.rollout_log import decode_images, decode_rollout, encode_images, encode_rollout
from npo_cli.types.rollouts import PromptSamples, Rollout
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


@dataclass(slots=True)
class SampleStore:
    """Samples of one or several policies, which only grow; the chunks of a killed process are all kept."""

    folder: Path
    _log: JsonlLog = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._log = JsonlLog(self.path)

    @property
    def path(self) -> Path:
        """The samples."""
        return self.folder / "rollouts.jsonl"

    @property
    def spec(self) -> StoreSettings:
        """What was sampled and how; a guide cache has its guide.json instead."""
        path = self.folder / "settings.json"
        return decode_record(StoreSettings, read_json(path), path)

    @property
    def scores_path(self) -> Path:
        """Scores of the candidates; absent until a scoring is finished."""
        return self.folder / "scores.json"

    @property
    def is_finished(self) -> bool:
        """Whether scores were saved."""
        return self.scores_path.exists()

    def append(self, candidate: str, chunk: Sequence[PromptSamples]) -> None:
        """Add a candidate's samples of a chunk of prompts as one line: it is on disk whole or not at all."""
        self._log.append({"candidate": candidate, "groups": [_encode_samples(samples) for samples in chunk]})

    def iter_samples(self) -> Iterator[tuple[str, str, PromptSamples]]:
        """Triples (line of the file, for errors; candidate; samples of one prompt), in the order sampled."""
        for number, row in enumerate(self._log.iter_rows(), start=1):
            line = f"{self.path}, line {number}"
            try:
                chunk = [(line, str(row["candidate"]), _decode_samples(group, line)) for group in row["groups"]]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise damaged_file_error(line, "it is not a chunk of groups") from error
            yield from chunk

    def read(self) -> dict[tuple[str, str], PromptSamples]:
        """All samples by (candidate, prompt id), in the order sampled."""
        return {(candidate, samples.prompt_id): samples for _, candidate, samples in self.iter_samples()}

    def read_prompts(self) -> dict[str, PromptSamples]:
        """All samples by prompt id, of a store with one candidate."""
        return {samples.prompt_id: samples for _, _, samples in self.iter_samples()}

    def count_tokens(self) -> int:
        """Tokens generated for all samples."""
        return sum(samples.num_tokens for _, _, samples in self.iter_samples())

    def seal(self) -> LogHead:
        """Force every line down to the disk; what is returned must be there from now on."""
        return self._log.seal()

    def check_finished(self, recorded: object, source: Path) -> None:
        """Refuse samples that are not those of which `source` was made, where they are `recorded`."""
        if not isinstance(recorded, dict):
            raise damaged_file_error(source, "it does not say which samples it was made of")
        check_log(self.path, decode_record(LogHead, recorded, source))

    @on_main_rank
    def delete(self) -> None:
        """Remove an unfinished store, whose checkpoints would otherwise never be deleted."""
        delete_atomically(self.folder)


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
    return SampleStore(folder)


def list_sample_stores(parent: Path) -> list[SampleStore]:
    """Every store in a folder such as RUN/scores, unfinished ones included, by folder name."""
    stores = [SampleStore(folder) for folder in list_folders(parent) if (folder / "settings.json").exists()]
    for store in stores:
        _ = store.spec  # Damage is reported before anything is written.
    return stores


def _encode_samples(samples: PromptSamples) -> dict[str, Any]:
    row = to_row(replace(samples, rollouts=(), images=()))
    row |= {"rollouts": [encode_rollout(rollout) for rollout in samples.rollouts]}
    row["images"] = encode_images(samples.images)
    return row


def _decode_samples(row: dict[str, Any], line: str) -> PromptSamples:
    """The samples of one prompt, checked: token ids, log-probabilities, correct rollouts kept before others."""
    rollouts = tuple(decode_rollout(rollout, line) for rollout in row["rollouts"])
    images = decode_images(row.get("images", ()), line)
    samples = replace(
        decode_record(PromptSamples, row | {"rollouts": (), "images": ()}, line), rollouts=rollouts, images=images
    )
    num_kept_correct = sum(rollout.is_correct for rollout in rollouts)
    if num_kept_correct != min(samples.num_correct, len(rollouts)) or not all(map(_is_verified, rollouts)):
        raise damaged_file_error(line, f"the rollouts of prompt {samples.prompt_id} are no verified responses")
    return samples


def _is_verified(rollout: Rollout) -> bool:
    ids, logps = rollout.response_ids, rollout.behavior_logps
    return (
        all(isinstance(token, int) and token >= 0 for token in ids)
        and (logps is None or len(logps) == len(ids))
        and rollout.verdict is not None
    )


# Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSet:
    """The saved scores of one learner's candidates."""

    branch: str
    learner_step: int
    sequence: int
    """From 1: how many times scores had been saved in the run by then. The largest is the newest."""
    folder: Path
    scores: tuple[CandidateScore, ...]


def save_scores(store: SampleStore, scores: Sequence[CandidateScore]) -> None:
    """Write scores.json; the scoring is then finished."""
    samples = store.seal()
    others = map(SampleStore, list_folders(store.folder.parent))
    saved = [_read_sequence(other.scores_path) for other in others if other.is_finished]
    head = {
        "branch": store.spec.branch,
        "learner_step": store.spec.step,
        "sequence": 1 + max(saved, default=0),
        "saved_at": now_utc(),
        "samples": encode_head(samples),
    }
    write_json_atomic(store.scores_path, {**head, "scores": [json.loads(encode_record(score)) for score in scores]})


def read_all_scores(run: RunDir) -> list[ScoreSet]:
    """Every finished scoring, oldest first."""
    finished = [store for store in list_sample_stores(run.scores_folder) if store.is_finished]
    return sorted(map(read_scores, finished), key=lambda found: found.sequence)


def _read_sequence(path: Path) -> int:
    sequence = read_json(path).get("sequence")
    if isinstance(sequence, bool) or not isinstance(sequence, int) or sequence < 1:
        raise damaged_file_error(path, f"sequence is {sequence!r}")
    return sequence


def read_scores(store: SampleStore) -> ScoreSet:
    """The scores of a finished scoring, checked."""
    path = store.scores_path
    row = read_json(path)
    _read_sequence(path)
    check_time(row, "saved_at", path)
    store.check_finished(row.get("samples"), path)
    rows = row.pop("scores", ())
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
