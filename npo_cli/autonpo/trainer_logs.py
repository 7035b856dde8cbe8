"""Reward and entropy by step, from the rows of a run's metrics or of any trainer's log (`log_files.py`).

The column names of npo, TRL, verl and prime-rl are known; any other one is given on the command line. A line without
a step, or with neither signal (an evaluation, for example), is skipped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npo_cli.autonpo.log_files import Row
from npo_cli.autonpo.trigger import TriggerInput
from npo_cli.errors import NpoError, quote_path

KNOWN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "training/global_step", "train/global_step", "trainer/global_step", "_step"),
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
"""Squares of larger values could overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogColumns:
    """Column names from the command line; None: use a known name."""

    step: str | None = None
    reward: str | None = None
    entropy: str | None = None


def extract_signals(rows: Sequence[Row], names: Mapping[str, str], *, source: Path) -> list[TriggerInput]:
    """Reward and entropy per step, in order of steps. If a step is recorded twice, the later line wins.

    It wins per column: some trainers write the reward and the entropy of a step in separate lines.
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
    """The columns of step, reward and entropy; an error lists the numeric columns if one is not among them."""
    numeric = _numeric(rows)
    for signal in KNOWN_COLUMNS:
        given = getattr(columns, signal)
        if given is not None and given not in numeric:
            raise NpoError(
                f"{source} has no number in a column {given!r}; {_list_columns(numeric)}", f"--{signal} COLUMN"
            )
    found = find_columns(rows, columns)
    missing = [signal for signal in KNOWN_COLUMNS if signal not in found]
    if missing:
        flags = " ".join(f"--{signal} COLUMN" for signal in missing)
        raise NpoError(
            f"{source} has no {' and no '.join(missing)} under a known name; {_list_columns(numeric)}",
            f"npo autonpo {quote_path(source)} --explain {flags}",
        )
    return found


def find_columns(rows: Sequence[Row], columns: LogColumns) -> dict[str, str]:
    """The columns of step, reward and entropy that exist: the given one, else the first known one."""
    numeric = _numeric(rows)
    names = {
        signal: getattr(columns, signal) or next((name for name in known if name in numeric), None)
        for signal, known in KNOWN_COLUMNS.items()
    }
    return {signal: name for signal, name in names.items() if name is not None}


def collect_metrics_by_step(rows: Sequence[Row], names: Mapping[str, str]) -> dict[int, dict[str, float]]:
    """Every number of each step by name, reward and entropy also under npo's names; the later line wins per column."""
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


def _list_columns(numeric: Iterable[str]) -> str:
    """The numeric columns, likely ones first."""
    ordered = sorted(numeric, key=lambda name: not any(part in name.lower() for part in RELEVANT_NAMES))
    rest = f" and {len(ordered) - MAX_LISTED_COLUMNS} more" if len(ordered) > MAX_LISTED_COLUMNS else ""
    return f"its numeric columns are: {', '.join(ordered[:MAX_LISTED_COLUMNS]) or 'none'}{rest}"


def _number(value: object) -> float | None:
    """A finite number; anything else is missing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_VALUE:
        return None
    return float(value)


def _step(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 0 and number.is_integer() else None
