"""Reward and entropy by step from somebody's records: a run's own, or any trainer's file of JSON lines.

Known are the names that npo, TRL, verl and prime-rl give them; any other column is named on the command line. A line
without a step, or with neither signal, is no record of a step (evaluations stand between them) and is passed over.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.autonpo.trigger import TriggerInput
from npo_cli.errors import NpoError, quote_path

Row = Mapping[str, Any]

KNOWN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "training/global_step", "_step", "trainer/global_step"),
    "reward": (
        *("reward", "critic/score/mean", "critic/rewards/mean", "rewards/mean", "train/reward"),
        *("reward/all/mean", "reward/mean"),
    ),
    "entropy": ("entropy", "actor/entropy", "actor/entropy_loss", "train/entropy", "entropy/mean"),
}
"""Column names in the order in which they are tried: npo and TRL, verl (its score before any KL penalty), prime-rl."""
RELEVANT_NAMES = ("step", "reward", "score", "acc", "entropy")
MAX_LISTED_COLUMNS = 16
MAX_VALUE = 1e100
"""Beyond it squares are no numbers any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogColumns:
    """Names given on the command line; None looks for a known one."""

    step: str | None = None
    reward: str | None = None
    entropy: str | None = None


def extract_signals(rows: Sequence[Row], names: Mapping[str, str], *, source: Path) -> list[TriggerInput]:
    """One signal a step, by step, from the columns so named. Of a step recorded twice the later line wins.

    It wins column by column: some trainers write the reward and the entropy of a step apart.
    """
    found: dict[int, dict[str, float | None]] = {}
    for row in rows:
        step = _step(row.get(names["step"]))
        seen = {signal: _number(row[names[signal]]) for signal in ("reward", "entropy") if names[signal] in row}
        if step is not None and seen:
            found[step] = found.get(step, {}) | seen
    if not found:
        raise NpoError(
            f"{source} has no line with a whole {names['step']!r} and a {names['reward']!r} or {names['entropy']!r}",
            f"npo autonpo {quote_path(source)} --explain --step COLUMN",
        )
    return [
        TriggerInput(step=step, reward=seen.get("reward"), entropy=seen.get("entropy"))
        for step, seen in sorted(found.items())
    ]


def resolve_columns(rows: Sequence[Row], columns: LogColumns, *, source: Path) -> dict[str, str]:
    """The column of each of the three; refused where one holds no number anywhere, with those that do."""
    numeric = _numeric(rows)
    for signal in KNOWN_COLUMNS:
        given = getattr(columns, signal)
        if given is not None and given not in numeric:
            raise NpoError(f"{source} has no number in a column {given!r}; {_listed(numeric)}", f"--{signal} COLUMN")
    found = find_columns(rows, columns)
    missing = [signal for signal in KNOWN_COLUMNS if signal not in found]
    if missing:
        flags = " ".join(f"--{signal} COLUMN" for signal in missing)
        raise NpoError(
            f"{source} has no {' and no '.join(missing)} by any name known here; {_listed(numeric)}",
            f"npo autonpo {quote_path(source)} --explain {flags}",
        )
    return found


def find_columns(rows: Sequence[Row], columns: LogColumns) -> dict[str, str]:
    """The column of each of the three that is there: the one that was named, else the first known one."""
    numeric = _numeric(rows)
    names = {
        signal: getattr(columns, signal) or next((name for name in known if name in numeric), None)
        for signal, known in KNOWN_COLUMNS.items()
    }
    return {signal: name for signal, name in names.items() if name is not None}


def collect_metrics_by_step(rows: Sequence[Row], names: Mapping[str, str]) -> dict[int, dict[str, float]]:
    """Every number of each step under its own name, reward and entropy under ours; the later line wins by column."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        step = _step(row.get(names["step"]))
        numbers = {name: _number(value) for name, value in row.items() if name not in ("step", "branch")}
        if step is not None:
            seen = {name: number for name, number in numbers.items() if number is not None}
            ours = {signal: seen[name] for signal, name in names.items() if signal != "step" and name in seen}
            found[step] = found.get(step, {}) | seen | ours
    return dict(sorted(found.items()))


def _numeric(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if _number(value) is not None))


def _listed(numeric: Iterable[str]) -> str:
    """The columns with numbers, those first that could be meant."""
    ordered = sorted(numeric, key=lambda name: not any(part in name.lower() for part in RELEVANT_NAMES))
    rest = f" and {len(ordered) - MAX_LISTED_COLUMNS} more" if len(ordered) > MAX_LISTED_COLUMNS else ""
    return f"its numbers are: {', '.join(ordered[:MAX_LISTED_COLUMNS]) or 'none'}{rest}"


def _number(value: object) -> float | None:
    """A finite number; everything else is a missing value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_VALUE:
        return None
    return float(value)


def _step(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 0 and number.is_integer() else None


# Files


def read_rows(path: Path) -> list[Row]:
    """Every line as one flat row; a torn last line is passed over, any other that is no JSON object is refused.

    The state that Hugging Face's trainer leaves (one object with a log_history) is read too.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NpoError(
            f"{path} is not UTF-8 text (byte {error.start})", "name a run directory, or a file of JSON lines"
        ) from error
    except OSError as error:
        raise NpoError(f"{path} cannot be read: {error.strerror}", "mend its rights, or name another file") from error
    lines = text.split("\n")
    whole = _history(text) if _parsed(lines[0]) is None or len(lines) <= 2 else None
    rows = whole if whole is not None else _rows(lines, path)
    if not rows:
        raise NpoError(f"{path} is empty", "it needs one JSON object a line, each with step, reward and entropy")
    return [_flat(row) for row in rows]


def _rows(lines: Sequence[str], path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and (number < len(lines) or not rows):
            raise NpoError(
                f"{path}, line {number}: not a JSON object", "write one JSON object a line, or name another file"
            )
    return rows


def _history(text: str) -> list[Row] | None:
    """The log_history of a trainer state; None where the text is no such thing."""
    found = (_parsed(text) or {}).get("log_history")
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _flat(row: Row) -> Row:
    """What is one level down joins the rest under its own name: verl writes {"step": 1, "data": {...}}."""
    inner = {name: value for group in row.values() if isinstance(group, dict) for name, value in group.items()}
    return {**inner, **row}
