"""Prompts from a file: checked row by row, split once, never shared between training and evaluation."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.image_columns import ImageColumn, add_images, drop_image_locations, join_parts
from npo_cli.tasks.prompt_format import format_prompt
from npo_cli.tasks.table_io import TableRow, read_rows
from npo_cli.types.rollouts import Message, Prompt

IMAGE_COLUMNS = ("images", "image")

LocatedPrompt = tuple[Prompt, str]
"""A prompt and the place in a file that it comes from."""


def load_file_prompts(settings: TaskSettings, *, seed: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """(pool, held-out). With a held-out file: the first rows of each. Without: a split drawn from the seed.

    The held-out rows do not depend on task.pool_size, so a larger pool is judged on the same problems.
    """
    rows = _placed_prompts(settings.path or "", settings, "rows")
    if settings.heldout_path is not None:
        train = rows[: settings.pool_size]
        heldout = _placed_prompts(settings.heldout_path, settings, "heldout")[: settings.heldout_size]
    else:
        train, heldout = _split(rows, settings, seed)
    _refuse_repeated_ids([*train, *heldout])
    _refuse_shared_prompts(train, heldout)
    return tuple(prompt for prompt, _ in train), tuple(prompt for prompt, _ in heldout)


def find_prompt_location(prompt: Prompt, settings: TaskSettings) -> str:
    """`data.jsonl line 3`: read again, as only an error asks."""
    placed = _placed_prompts(settings.path or "", settings, "rows")
    if settings.heldout_path is not None:
        placed += _placed_prompts(settings.heldout_path, settings, "heldout")
    return next(place for each, place in placed if each.prompt_id == prompt.prompt_id)


def _split(
    rows: Sequence[LocatedPrompt], settings: TaskSettings, seed: int
) -> tuple[list[LocatedPrompt], list[LocatedPrompt]]:
    """Shuffle once; held-out rows from the back, training rows from the front; each in the file's order."""
    num_heldout = settings.heldout_size
    if len(rows) <= num_heldout:
        raise NpoError(
            f"{settings.path} has {len(rows)} rows, too few to hold out {num_heldout} and train on the rest",
            f"set task.heldout_size below {len(rows)}, add rows, or name a task.heldout_path",
        )
    order = list(range(len(rows)))
    random.Random(f"split:{seed}").shuffle(order)
    cut = len(rows) - num_heldout
    return (
        [rows[place] for place in sorted(order[:cut][: settings.pool_size])],
        [rows[place] for place in sorted(order[cut:])],
    )


def _placed_prompts(path: str, settings: TaskSettings, prefix: str) -> list[LocatedPrompt]:
    file = Path(path).expanduser()
    columns = [settings.prompt_column, settings.answer_column]
    columns += [settings.id_column] if settings.id_column is not None else []
    if settings.image_column is None:
        rows = read_rows(file, columns=[*columns, *IMAGE_COLUMNS])
        return [(_prompt(row, settings, f"{prefix}/{row.position:06d}"), row.location) for row in rows]
    rows = read_rows(file, columns=columns)
    album = ImageColumn(file=file, column=settings.image_column, max_pixels=settings.max_image_pixels)
    bare = [_prompt(row, settings, f"{prefix}/{row.position:06d}") for row in rows]
    return [
        (add_images(prompt, images, row.location), row.location)
        for prompt, row, images in zip(bare, rows, album.read_images(rows), strict=True)
    ]


def _prompt(row: TableRow, settings: TaskSettings, numbered_id: str) -> Prompt:
    there = [column for column in IMAGE_COLUMNS if row.values.get(column)]
    if settings.image_column is None and there:
        raise NpoError(
            f"{row.location} has images, and task.image_column names none",
            f"set task.image_column={there[0]}; pictures are never dropped in silence",
        )
    answer = _scalar(row, settings.answer_column, "task.answer_column")
    prompt_id = _scalar(row, settings.id_column, "task.id_column") if settings.id_column else numbered_id
    question = _cell(row, settings.prompt_column, "task.prompt_column")
    bare = Prompt(prompt_id=prompt_id, answer=answer, row=row.position)
    if isinstance(question, list):
        turns = _messages(question, row.location, parts=settings.image_column is not None)
        return _sound(format_prompt(turns, settings=settings, prompt=bare), row.location)
    if not isinstance(question, str):
        kind = "null" if question is None else type(question).__name__
        raise NpoError(
            f"{row.location}: the prompt is a {kind}", "write a string, or a list of {role, content} messages"
        )
    if not question.strip():
        raise NpoError(f"{row.location}: the prompt is empty", "fill it in or remove the row")
    if settings.system and not settings.chat:
        raise NpoError(f"task.system needs chat prompts, but {row.location} is plain text", "set task.chat=true")
    return _sound(format_prompt(question, settings=settings, prompt=bare), row.location)


def _sound(prompt: Prompt, place: str) -> Prompt:
    """The prompt itself, if it is text: JSON can spell half a character, which no tokenizer takes."""
    for text in (prompt.prompt_id, prompt.answer, prompt.text or "", *(turn.content for turn in prompt.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise NpoError(f"{place} holds half a character ({half})", "write the whole character, in UTF-8") from error
    return prompt


def _messages(turns: list[Any], place: str, *, parts: bool) -> list[Message]:
    """Chat messages, whole: what would be lost (a tool call, an image nobody asked for) is an error."""
    messages = [_message(turn, f"{place}, message {at}", parts=parts) for at, turn in enumerate(turns, start=1)]
    if not messages or not messages[-1].content.strip():
        raise NpoError(f"{place}: the prompt is empty", "fill it in or remove the row")
    if messages[-1].role in ("assistant", "system"):
        role = messages[-1].role
        raise NpoError(f"{place}: the last message is the {role}'s", "end a prompt with what is to be answered")
    return messages


def _message(turn: object, place: str, *, parts: bool) -> Message:
    hint = 'write {"role": "user", "content": "..."}'
    if not isinstance(turn, dict):
        raise NpoError(f"{place} is not an object with role and content", hint)
    role, content = turn.get("role"), turn.get("content")
    if isinstance(content, list) and parts:
        content = join_parts(content, place)
    elif isinstance(content, list) and any(
        isinstance(part, dict) and "image" in str(part.get("type")) for part in content
    ):
        raise NpoError(f"{place} has an image, and task.image_column names none", "set task.image_column=images")
    if not isinstance(role, str) or not role or not isinstance(content, str):
        raise NpoError(f"{place}: role and content must be strings", hint)
    extra = [key for key, value in turn.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise NpoError(f"{place} has {extra[0]!r}, which is not read", f"remove it; {hint}")
    return Message(role=role, content=content)


def _cell(row: TableRow, column: str, key: str) -> Any:
    if column not in row.values:
        raise NpoError(
            f"{row.location} has no column {column!r} ({key})",
            f"set {key} to one of: {', '.join(map(str, row.values)) or '(it has none)'}",
        )
    return row.values[column]


def _scalar(row: TableRow, column: str, key: str) -> str:
    """A string or a number, as text."""
    value = _cell(row, column, key)
    if isinstance(value, float) and math.isnan(value):
        value = None  # how pandas writes a missing number
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        kind = "null" if value is None else type(value).__name__
        raise NpoError(f"{row.location}: {column!r} is a {kind}, not a string or a number", f"mend it, or {key}")
    if not str(value).strip():
        raise NpoError(f"{row.location}: {column!r} is empty", "fill it in or remove the row")
    return str(value)


def _refuse_repeated_ids(placed: Sequence[LocatedPrompt]) -> None:
    first: dict[str, str] = {}
    for prompt, place in placed:
        if prompt.prompt_id in first:
            raise NpoError(
                f"{place} has the prompt id {prompt.prompt_id!r} of {first[prompt.prompt_id]}",
                "make the ids unique, or leave task.id_column out to number the rows",
            )
        first[prompt.prompt_id] = place


def _refuse_shared_prompts(train: Sequence[LocatedPrompt], heldout: Sequence[LocatedPrompt]) -> None:
    """A held-out problem that is trained on measures memory."""
    trained = {_asked(prompt): place for prompt, place in train}
    for prompt, place in heldout:
        if _asked(prompt) in trained:
            raise NpoError(
                f"{place} (held out) is the same prompt as {trained[_asked(prompt)]} (trained on)",
                "remove one of the two rows",
            )


def _asked(prompt: Prompt) -> Prompt:
    """The prompt without what tells two rows apart."""
    return replace(prompt, prompt_id="", answer="", row=0, images=drop_image_locations(prompt.images))
