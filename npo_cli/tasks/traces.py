"""Traces that somebody brings: answers in JSONL or parquet, each matched to a prompt of the task.

A row says which prompt it answers (`prompt_id`, or `prompt` as text or messages, exactly as the task or its data file
has it) and what the answer is (`response` as text, or `response_ids` in the learner's tokens, perhaps with `logps`).
Nothing in it is believed: whether it is right is the verifier's to say, elsewhere. A row that cannot be used is left
out and named.
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
    """One answer that somebody brought."""

    location: str
    """`traces.jsonl line 3`."""
    text: str | None
    response_ids: tuple[int, ...] | None
    """Where they are given the text is not looked at."""
    logps: tuple[float, ...] | None
    """One a token (nats), under who wrote it."""


@dataclass(kw_only=True, slots=True)
class TraceFile:
    """A file of traces, sorted out."""

    by_prompt: dict[str, list[Trace]] = field(default_factory=dict)
    """In the order of the file."""
    unmatched_rows: list[str] = field(default_factory=list)
    """Places of rows whose prompt the task does not have."""
    invalid_rows: list[str] = field(default_factory=list)
    """Rows that cannot be used, each with the reason."""


class _Unusable(Exception):
    """Why a row cannot be used."""


def validate_trace_path(path: Path) -> None:
    """A file that is not there, or of another kind, is told before anything is opened."""
    if not path.is_file():
        raise NpoError(f"there is no file of traces {path}", "--from traces.jsonl")
    if path.suffix not in (".jsonl", ".parquet"):
        raise NpoError(f"{path} is neither .jsonl nor .parquet", "write one JSON object a line: prompt_id, response")


def read_traces(path: Path, prompts: Sequence[Prompt], settings: TaskSettings) -> TraceFile:
    """Every row of the file, matched or named."""
    found = TraceFile()
    matched = _matcher(prompts, settings)
    for row in read_rows(path, columns=TRACE_COLUMNS):
        try:
            prompt_ids, trace = matched(row), _trace(row)
        except _Unusable as reason:
            found.invalid_rows.append(f"{row.location}: {reason}")
            continue
        if not prompt_ids:
            found.unmatched_rows.append(row.location)
        for prompt_id in prompt_ids:
            found.by_prompt.setdefault(prompt_id, []).append(trace)
    return found


def _matcher(prompts: Sequence[Prompt], settings: TaskSettings) -> Callable[[TableRow], list[str]]:
    """Ids of the prompts that a row answers: several where the task asks the same more than once."""
    known = {prompt.prompt_id for prompt in prompts}
    by_question: dict[object, list[str]] = {}
    # The same words are asked of many pictures: only its id says which prompt with pictures is meant.
    for prompt in (prompt for prompt in prompts if not prompt.images):
        by_question.setdefault(_question(prompt), []).append(prompt.prompt_id)
    blank = Prompt(prompt_id="", answer="")

    def matched(row: TableRow) -> list[str]:
        name, asked = row.values.get("prompt_id"), row.values.get("prompt")
        if isinstance(name, str | int) and not isinstance(name, bool):
            return [str(name)] if str(name) in known else []
        if name is not None:
            raise _Unusable(f"prompt_id is {_kind(name)}")
        question = _as_question(asked)
        as_it_is = replace(blank, text=question) if isinstance(question, str) else replace(blank, messages=question)
        # As the task has it, or as its data file has it, before suffix, system message and chat.
        for form in (as_it_is, format_prompt(question, settings=settings, prompt=blank)):
            if _question(form) in by_question:
                return by_question[_question(form)]
        return []

    return matched


def _question(prompt: Prompt) -> object:
    return prompt.text if prompt.text is not None else prompt.messages


def _as_question(asked: object) -> str | tuple[Message, ...]:
    if isinstance(asked, str):
        return asked
    if asked is None:
        raise _Unusable("it has neither prompt_id nor prompt")
    turns = asked if isinstance(asked, list) else []
    pairs = [(turn.get("role"), turn.get("content")) for turn in turns if isinstance(turn, dict)]
    if not turns or len(pairs) < len(turns) or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise _Unusable(f"prompt is {_kind(asked)}, neither text nor messages")
    return tuple(Message(role=role, content=content) for role, content in pairs)


def _trace(row: TableRow) -> Trace:
    values = row.values
    ids, text = values.get("response_ids"), values.get("response")
    if ids is None and not isinstance(text, str):
        raise _Unusable("it has no response" if text is None else f"response is {_kind(text)}")
    if ids is not None:
        ids = _numbers(ids, "response_ids", sound=_is_token)
    elif not _is_text(text):
        raise _Unusable("response holds half a character")
    logps = values.get("logps")
    if logps is not None:
        logps = tuple(map(float, _numbers(logps, "logps", sound=_is_logp)))
    if ids is not None and logps is not None and len(ids) != len(logps):
        raise _Unusable(f"it has {len(ids)} response_ids and {len(logps)} logps")
    return Trace(location=row.location, text=text if ids is None else None, response_ids=ids, logps=logps)


def _numbers(value: object, name: str, *, sound: Callable[[object], bool]) -> tuple[Any, ...]:
    if not isinstance(value, list) or not value or not all(map(sound, value)):
        raise _Unusable(f"{name} is no list of what it should hold")
    return tuple(value)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_logp(value: object) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and _is_log(float(value))


def _is_log(value: float) -> bool:
    """Of a probability: at most 0, rounding allowed."""
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


def format_locations(places: Iterable[str], *, count: int = 3) -> str:
    """The first few, and how many more."""
    every = list(places)
    rest = f" and {len(every) - count} more" if len(every) > count else ""
    return "; ".join(every[:count]) + rest
