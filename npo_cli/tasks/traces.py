"""Traces: responses from a .jsonl or .parquet file, each matched to a prompt of the task.

A row names its prompt (`prompt_id`, or `prompt` as text or messages, exactly as in the task or its data file) and holds
the response (`response` as text, or `response_ids` in the learner's tokens, optionally with `logps`). Responses are
verified later like any others. Rows that cannot be used are skipped and reported.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.prompt_format import format_prompt
from npo_cli.tasks.table_io import TableRow, read_rows
from npo_cli.types.rollouts import Message, Prompt

TRACE_COLUMNS = ("prompt_id", "prompt", "response", "response_ids", "logps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One response from the file."""

    location: str
    """`traces.jsonl line 3`."""
    text: str | None
    response_ids: tuple[int, ...] | None
    """If given, the text is ignored."""
    logps: tuple[float, ...] | None
    """Log-probability per token (nats) under the policy that sampled the response."""


@dataclass(kw_only=True, slots=True)
class TraceFile:
    """A file of traces, matched to prompts."""

    by_prompt: dict[str, list[Trace]] = field(default_factory=dict)
    """In the order of the file."""
    unmatched_rows: list[str] = field(default_factory=list)
    """Locations of rows whose prompt is not in the task."""
    invalid_rows: list[str] = field(default_factory=list)
    """Rows that cannot be used, each with the reason."""


class _Unusable(Exception):
    """The reason why a row cannot be used."""


def validate_trace_path(path: Path) -> None:
    """Raise if the file does not exist or has another format."""
    if not path.is_file():
        raise NpoError(f"there is no file of traces {path}", "for example file:traces.jsonl")
    if path.suffix not in (".jsonl", ".parquet"):
        raise NpoError(f"{path} is neither .jsonl nor .parquet", "write one JSON object a line: prompt_id, response")


def read_traces(path: Path, prompts: Sequence[Prompt], settings: TaskSettings) -> TraceFile:
    """Match every row of the file, or report it."""
    found = TraceFile()
    match = _matcher(prompts, settings)
    for row in read_rows(path, columns=TRACE_COLUMNS):
        try:
            prompt_ids, trace = match(row), _parse_trace(row)
        except _Unusable as reason:
            found.invalid_rows.append(f"{row.location}: {reason}")
            continue
        if not prompt_ids:
            found.unmatched_rows.append(row.location)
        for prompt_id in prompt_ids:
            found.by_prompt.setdefault(prompt_id, []).append(trace)
    return found


def _matcher(prompts: Sequence[Prompt], settings: TaskSettings) -> Callable[[TableRow], list[str]]:
    """A function from a row to the ids of its prompts: several if the task repeats a question."""
    known = {prompt.prompt_id for prompt in prompts}
    by_question: dict[object, list[str]] = {}
    # Many prompts with images have the same text, so only an id can name one of them.
    for prompt in (prompt for prompt in prompts if not prompt.images):
        by_question.setdefault(_question(prompt), []).append(prompt.prompt_id)
    blank = Prompt(prompt_id="", answer="")

    def match(row: TableRow) -> list[str]:
        name, prompt_value = row.values.get("prompt_id"), row.values.get("prompt")
        if isinstance(name, str | int) and not isinstance(name, bool):
            return [str(name)] if str(name) in known else []
        if name is not None:
            raise _Unusable(f"prompt_id is {_kind(name)}")
        question = _parse_question(prompt_value)
        as_it_is = replace(blank, text=question) if isinstance(question, str) else replace(blank, messages=question)
        # In the form of the task, or of its data file (before suffix, system message and chat template).
        for form in (as_it_is, format_prompt(question, settings=settings, prompt=blank)):
            if _question(form) in by_question:
                return by_question[_question(form)]
        return []

    return match


def _question(prompt: Prompt) -> object:
    return prompt.text if prompt.text is not None else prompt.messages


def _parse_question(value: object) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return value
    if value is None:
        raise _Unusable("it has neither prompt_id nor prompt")
    turns = value if isinstance(value, list) else []
    pairs = [(turn.get("role"), turn.get("content")) for turn in turns if isinstance(turn, dict)]
    if not turns or len(pairs) < len(turns) or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise _Unusable(f"prompt is {_kind(value)}, neither text nor messages")
    return tuple(Message(role=role, content=content) for role, content in pairs)


def _parse_trace(row: TableRow) -> Trace:
    values = row.values
    ids, text = values.get("response_ids"), values.get("response")
    if ids is None and not isinstance(text, str):
        raise _Unusable("it has no response" if text is None else f"response is {_kind(text)}")
    if ids is not None:
        ids = _numbers(ids, "response_ids", is_valid=_is_token)
    elif not _is_text(text):
        raise _Unusable("response contains half of a surrogate pair")
    logps = values.get("logps")
    if logps is not None:
        logps = tuple(map(float, _numbers(logps, "logps", is_valid=_is_logp)))
    if ids is not None and logps is not None and len(ids) != len(logps):
        raise _Unusable(f"it has {len(ids)} response_ids and {len(logps)} logps")
    return Trace(location=row.location, text=text if ids is None else None, response_ids=ids, logps=logps)


def _numbers(value: object, name: str, *, is_valid: Callable[[object], bool]) -> tuple[Any, ...]:
    if not isinstance(value, list) or not value or not all(map(is_valid, value)):
        raise _Unusable(f"{name} is not a list of valid values")
    return tuple(value)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_logp(value: object) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and _is_log(float(value))


def _is_log(value: float) -> bool:
    """A log-probability: finite and at most 0, up to rounding."""
    return math.isfinite(value) and value <= 1e-3


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    names: Mapping[type, str] = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")


def format_locations(locations: Iterable[str], *, count: int = 3) -> str:
    """The first few locations, and how many more there are."""
    listed = list(locations)
    rest = f" and {len(listed) - count} more" if len(listed) > count else ""
    return "; ".join(listed[:count]) + rest
