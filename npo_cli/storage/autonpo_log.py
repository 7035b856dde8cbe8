"""Files of AutoNPO in a run directory: the controller's transitions, and the rollouts of each probe.

autonpo.jsonl holds no time of day: two runs of one seed have files that are equal byte for byte. Its last line and
the metrics after that line's step are all that a restart needs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.storage.files import damaged_file_error, decode_record, encode_record, to_row, write_json_atomic
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, format_step
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.autonpo import AutoNPOState, Transition

KEY_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeStore:
    """The probe of one policy: its settings, and its rollouts chunk by chunk."""

    folder: Path

    @property
    def rollouts(self) -> RolloutLog:
        """Every group; the field `step` of a line is the number of its chunk of prompts, from 0."""
        return RolloutLog(self.folder / "rollouts.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """A line without its state."""

    step: int
    event: str
    phase_before: str
    evidence: Mapping[str, Any]


def autonpo_path(run: RunDir) -> Path:
    """The log of transitions, oldest first."""
    return run.root / "autonpo.jsonl"


def append_transitions(run: RunDir, transitions: Sequence[Transition]) -> None:
    """Write the transitions of one event together and sync them: nothing before them is decided again."""
    if transitions:
        log = JsonlLog(autonpo_path(run))
        log.extend([_row(transition) for transition in transitions])
        log.sync()


def _row(transition: Transition) -> dict[str, Any]:
    """Step, event, phases and branch first; the whole state and the evidence last."""
    row = to_row(transition)
    state, evidence = row.pop("state"), row.pop("evidence")
    return {**row, "phase": state["phase"], "branch": state["branch"], "state": state, "evidence": evidence}


def read_transitions(run: RunDir) -> list[Transition]:
    """Every transition, oldest first; none without AutoNPO."""
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
    """The folder of the probe of this policy with these settings, created on first use."""
    content = {"branch": branch, "step": step, "settings": dict(settings)}
    canonical = json.dumps(json.loads(encode_record(content)), sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(canonical.encode("ascii")).hexdigest()[:KEY_LENGTH]
    folder = run.root / "probes" / f"{branch}_{format_step(step)}_{key}"
    if not (folder / "settings.json").exists():
        write_json_atomic(folder / "settings.json", content)
    return ProbeStore(folder=folder)
