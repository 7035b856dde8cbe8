"""What AutoNPO leaves in a run: the moves of its state machine, and the answers of each probe.

autonpo.jsonl holds no time of day: two runs of one seed have files that are equal byte for byte. Its last line and
the metrics after that line's step are all that a restart needs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.storage.files import damaged_file_error, decode_record, encode_record, read_json, to_row, write_json_atomic
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, format_step
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.autonpo import AutoNPOState, Transition

KEY_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSpec:
    """What settings.json of a probe says."""

    branch: str
    step: int
    settings: Mapping[str, Any]
    """Everything else that decides what is sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeStore:
    """One confirmation of one policy: its question, and its answers chunk by chunk."""

    folder: Path
    branch: str
    step: int

    @property
    def rollouts(self) -> RolloutLog:
        """Every answer; the field `step` of a line is the number of its chunk, from 0."""
        return RolloutLog(self.folder / "rollouts.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """A line as it is written, without the state."""

    step: int
    event: str
    phase_before: str
    evidence: Mapping[str, Any]


def autonpo_path(run: RunDir) -> Path:
    """The moves of the state machine, oldest first."""
    return run.root / "autonpo.jsonl"


def probes_folder(run: RunDir) -> Path:
    """One folder a probe."""
    return run.root / "probes"


def append_transitions(run: RunDir, transitions: Sequence[Transition]) -> None:
    """Write down the moves that one fact made, in one go, synced: nothing before them is decided again."""
    if transitions:
        journal = JsonlLog(autonpo_path(run))
        journal.extend([_row(move) for move in transitions])
        journal.sync()


def _row(move: Transition) -> dict[str, Any]:
    """Who, when, what first; the whole state and the evidence behind."""
    row = to_row(move)
    state, evidence = row.pop("state"), row.pop("evidence")
    return {**row, "phase": state["phase"], "branch": state["branch"], "state": state, "evidence": evidence}


def read_transitions(run: RunDir) -> list[Transition]:
    """Every move, oldest first; none where AutoNPO never watched."""
    path = autonpo_path(run)
    return [
        _transition_of(row, f"{path}, line {number}") for number, row in enumerate(JsonlLog(path).iter_rows(), start=1)
    ]


def _transition_of(row: dict[str, Any], source: str) -> Transition:
    if not isinstance(row.get("state"), dict):
        raise damaged_file_error(source, "it has no state")
    state = decode_record(AutoNPOState, row["state"], source)
    line = decode_record(_Line, row, source)
    return Transition(
        step=line.step, event=line.event, phase_before=line.phase_before, state=state, evidence=line.evidence
    )


def open_probe(run: RunDir, branch: str, step: int, *, settings: Mapping[str, Any]) -> ProbeStore:
    """The folder of this probe, made or found again by its policy and settings."""
    question = {"branch": branch, "step": step, "settings": dict(settings)}
    canonical = json.dumps(json.loads(encode_record(question)), sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(canonical.encode("ascii")).hexdigest()[:KEY_LENGTH]
    folder = probes_folder(run) / f"{branch}_{format_step(step)}_{key}"
    if not (folder / "settings.json").exists():
        write_json_atomic(folder / "settings.json", question)
    return ProbeStore(folder=folder, branch=branch, step=step)


def list_probes(run: RunDir) -> list[ProbeStore]:
    """Every probe, unfinished ones included, by folder name."""
    if not probes_folder(run).is_dir():
        return []
    found = []
    for folder in sorted(probes_folder(run).iterdir()):
        path = folder / "settings.json"
        if path.exists():
            spec = decode_record(ProbeSpec, read_json(path), path)
            found.append(ProbeStore(folder=folder, branch=spec.branch, step=spec.step))
    return found


def count_probe_tokens(probe: ProbeStore) -> int:
    """Tokens generated for it."""
    groups = (group for _, group in probe.rollouts.iter_groups())
    return sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
