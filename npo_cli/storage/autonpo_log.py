"""autonpo.jsonl: the transitions of AutoNPO's controller.

It holds no time of day: two runs of one seed have files that are equal byte for byte. Its last line and the metrics
after that line's step are all that a restart needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.storage.files import damaged_file_error, decode_record, to_row
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.types.autonpo import AutoNPOState, Transition


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
    """Write the transitions of one event together and seal them: nothing before them is decided again."""
    if transitions:
        log = JsonlLog(autonpo_path(run))
        log.extend([_row(transition) for transition in transitions])
        log.seal()


LADDER_FIELDS = ("rung", "refusals", "waits")
"""Fields of the state that are left out where they are empty."""


def _row(transition: Transition) -> dict[str, Any]:
    """Step, event, phases and branch first; the state and the evidence last."""
    row = to_row(transition)
    state, evidence = row.pop("state"), row.pop("evidence")
    state = {name: value for name, value in state.items() if value or name not in LADDER_FIELDS}
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
