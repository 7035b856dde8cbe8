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

from npo_cli.auto_records import AutoState, Transition
from npo_cli.run_dir.files import build, damaged, encode, read_json, row_of, write_json_atomic
from npo_cli.run_dir.journal import Journal
from npo_cli.run_dir.paths import RunDir, step_name
from npo_cli.run_dir.rollouts import RolloutJournal

KEY_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeQuestion:
    """What settings.json of a probe says."""

    branch: str
    step: int
    settings: Mapping[str, Any]
    """Everything else that decides what is sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFolder:
    """One confirmation of one policy: its question, and its answers chunk by chunk."""

    folder: Path
    branch: str
    step: int

    @property
    def rollouts(self) -> RolloutJournal:
        """Every answer; the field `step` of a line is the number of its chunk, from 0."""
        return RolloutJournal(self.folder / "rollouts.jsonl")


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


def judgement_folder(run: RunDir, branch: str, step: int) -> Path:
    """Where the clock of one held-out test lies; what it found is in autonpo.jsonl."""
    return run.root / "judgements" / f"{branch}_{step_name(step)}"


def judgements(run: RunDir) -> list[Path]:
    """The folder of every such test."""
    root = run.root / "judgements"
    return sorted(root.iterdir()) if root.is_dir() else []


def append_transitions(run: RunDir, moves: Sequence[Transition]) -> None:
    """Write down the moves that one fact made, in one go, synced: nothing before them is decided again."""
    if moves:
        journal = Journal(autonpo_path(run))
        journal.extend([_row(move) for move in moves])
        journal.sync()


def _row(move: Transition) -> dict[str, Any]:
    """Who, when, what first; the whole state and the evidence behind."""
    row = row_of(move)
    state, evidence = row.pop("state"), row.pop("evidence")
    return {**row, "phase": state["phase"], "branch": state["branch"], "state": state, "evidence": evidence}


def transitions(run: RunDir) -> list[Transition]:
    """Every move, oldest first; none where AutoNPO never watched."""
    path = autonpo_path(run)
    return [
        _transition_of(row, f"{path}, line {number}") for number, row in enumerate(Journal(path).records(), start=1)
    ]


def _transition_of(row: dict[str, Any], source: str) -> Transition:
    if not isinstance(row.get("state"), dict):
        raise damaged(source, "it has no state")
    state = build(AutoState, row["state"], source)
    line = build(_Line, row, source)
    return Transition(
        step=line.step, event=line.event, phase_before=line.phase_before, state=state, evidence=line.evidence
    )


def open_probe(run: RunDir, branch: str, step: int, *, settings: Mapping[str, Any]) -> ProbeFolder:
    """The folder of this probe, made or found again by its policy and settings."""
    question = {"branch": branch, "step": step, "settings": dict(settings)}
    canonical = json.dumps(json.loads(encode(question)), sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(canonical.encode("ascii")).hexdigest()[:KEY_LENGTH]
    folder = probes_folder(run) / f"{branch}_{step_name(step)}_{key}"
    if not (folder / "settings.json").exists():
        write_json_atomic(folder / "settings.json", question)
    return ProbeFolder(folder=folder, branch=branch, step=step)


def probes(run: RunDir) -> list[ProbeFolder]:
    """Every probe, unfinished ones included, by folder name."""
    if not probes_folder(run).is_dir():
        return []
    found = []
    for folder in sorted(probes_folder(run).iterdir()):
        path = folder / "settings.json"
        if path.exists():
            said = build(ProbeQuestion, read_json(path), path)
            found.append(ProbeFolder(folder=folder, branch=said.branch, step=said.step))
    return found


def probe_tokens(probe: ProbeFolder) -> int:
    """Tokens generated for it."""
    groups = (group for _, group in probe.rollouts.iter_groups())
    return sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
