"""Prompts from the rows of a file or data set: checked, and split into disjoint training and held-out prompts."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import repeat
from typing import Any

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.registry import TASKS, VERIFIERS
from npo_cli.tasks.base import LoadedPrompts, TaskSource
from npo_cli.tasks.custom_verifier import is_custom_verifier
from npo_cli.tasks.data_sets import DataPart, check_parts, heldout_part, read_part, training_part
from npo_cli.tasks.image_columns import ImageColumn, add_images, drop_image_locations, join_parts
from npo_cli.tasks.prompt_format import format_prompt
from npo_cli.tasks.table_io import TableRow
from npo_cli.types.rollouts import Message, Prompt

IMAGE_COLUMNS = ("images", "image")
DEFAULT_ANSWER_COLUMN = TaskSettings().answer_column
"""Read where it is there; a column that task.answer_column names must be there."""


class FileTask(TaskSource):
    """Prompts from a file or data set, with columns for prompt, answer, id and images."""

    name = "file"
    default_verifier = "math_verify"
    supports_images = True

    @classmethod
    def validate(cls, settings: TaskSettings) -> None:
        """There is a path, and splits only where the data has some."""
        super().validate(settings)
        if not settings.path:
            raise NpoError(
                "task.source=file needs a file", "set task.path to a file, a folder, or OWNER/NAME on the hub"
            )
        check_parts(settings)

    @classmethod
    def load(cls, settings: TaskSettings, *, seed: int) -> LoadedPrompts:
        """Read and split the file."""
        train, heldout = load_file_prompts(settings, seed=seed)
        return LoadedPrompts(train=train, heldout=heldout)

    @classmethod
    def locate(cls, prompt: Prompt, settings: TaskSettings) -> str:
        """`data.jsonl line 3: `, found by reading the file again, since only an error needs it."""
        heldout = heldout_part(settings)
        located = read_prompts(training_part(settings), settings, "rows")
        located += [] if heldout is None else read_prompts(heldout, settings, "heldout")
        return next(f"{location}: " for each, location in located if each.prompt_id == prompt.prompt_id)


MORE_ROWS = ", add rows, or set task.heldout_path"
LocatedPrompt = tuple[Prompt, str]
"""A prompt and where in a file it comes from."""


def load_file_prompts(settings: TaskSettings, *, seed: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """(pool, held-out). With a held-out file or split: the first rows of each. Without: a random split by the seed.

    The held-out rows do not depend on task.pool_size, so runs with different pools are evaluated on the same prompts.
    """
    part = heldout_part(settings)
    rows = read_prompts(training_part(settings), settings, "rows")
    if part is not None:
        train = rows[: settings.pool_size]
        heldout = read_prompts(part, settings, "heldout")[: settings.heldout_size]
    else:
        train, heldout = split_prompts(rows, settings, seed)
    check_unique_ids([*train, *heldout])
    check_disjoint(train, heldout)
    return tuple(prompt for prompt, _ in train), tuple(prompt for prompt, _ in heldout)


def split_prompts(
    rows: Sequence[LocatedPrompt], settings: TaskSettings, seed: int
) -> tuple[list[LocatedPrompt], list[LocatedPrompt]]:
    """Shuffle; held-out rows from the end, training rows from the start, each in the order of the file."""
    num_heldout = settings.heldout_size
    check_num_rows(len(rows), settings.heldout_size, source=f"{settings.path} has", hint=MORE_ROWS)
    order = list(range(len(rows)))
    random.Random(f"split:{seed}").shuffle(order)
    num_train = len(rows) - num_heldout
    return (
        [rows[index] for index in sorted(order[:num_train][: settings.pool_size])],
        [rows[index] for index in sorted(order[num_train:])],
    )


def check_num_rows(num_rows: int, num_heldout: int, *, source: str, hint: str = "", unit: str = "rows") -> None:
    """Refuse data of which the held-out split would leave nothing to train on; `source` begins the message."""
    if num_rows <= num_heldout:
        raise NpoError(
            f"{source} {num_rows} {unit}, too few to hold out {num_heldout} and train on the rest",
            f"set task.heldout_size below {num_rows}{hint}",
        )


def read_prompts(part: DataPart, settings: TaskSettings, prefix: str) -> list[LocatedPrompt]:
    """Every row as a prompt, with its place; the first fault is raised."""
    return list(iter_prompts(part, settings, prefix, read_part(part, without=settings.image_column)))


def iter_prompts(
    part: DataPart,
    settings: TaskSettings,
    prefix: str,
    rows: Sequence[TableRow],
    on_fault: Callable[[tuple[str, NpoError]], None] | None = None,
) -> Iterator[LocatedPrompt]:
    """The rows of a file or data set as prompts, with their places and images.

    A faulty row is raised, or with `on_fault` reported with its place and left out.
    """
    needs_answer = needs_answers(settings)
    column = None if settings.image_column is None else ImageColumn.open(part, settings)
    cells = repeat(None) if column is None else column.read_cells(rows)
    for row, cell in zip(rows, cells, strict=column is not None):
        try:
            prompt = make_prompt(row, settings, f"{prefix}/{row.position:06d}", needs_answer=needs_answer)
            if column is not None:
                prompt = add_images(prompt, column.read_images(cell, row), row.location)
            yield prompt, row.location
        except NpoError as error:
            if on_fault is None:
                raise
            on_fault((row.location, error))


def needs_answers(settings: TaskSettings, *, default_verifier: str | None = None) -> bool:
    """Whether a verifier of task.verifier compares with the reference answer, so that every row must have one."""
    default = default_verifier or TASKS.get(settings.source).default_verifier
    names = [default if name == "auto" else name for name in settings.verifiers]
    return any(
        name not in VERIFIERS.names() or VERIFIERS.get(name).needs_answer
        for name in names
        if not is_custom_verifier(name)
    )


def make_prompt(row: TableRow, settings: TaskSettings, numbered_id: str, *, needs_answer: bool) -> Prompt:
    """One row as a prompt without its images; `numbered_id` is its id unless task.id_column names another."""
    ignored = [column for column in IMAGE_COLUMNS if row.values.get(column)]
    if settings.image_column is None and ignored:
        raise NpoError(
            f"{row.location} has images, but task.image_column is not set",
            f"set task.image_column={ignored[0]}, or remove the column",
        )
    answer = ""
    if needs_answer or settings.answer_column in row.values or settings.answer_column != DEFAULT_ANSWER_COLUMN:
        answer = _cut_answer(_scalar(row, settings.answer_column, "task.answer_column"), row.location, settings)
    prompt_id = _scalar(row, settings.id_column, "task.id_column") if settings.id_column else numbered_id
    question = _cell(row, settings.prompt_column, "task.prompt_column")
    columns = {name: _as_float(value) for name, value in row.values.items() if name != settings.image_column}
    bare = Prompt(prompt_id=prompt_id, answer=answer, row=row.position, columns=columns)
    if isinstance(question, list):
        turns = _messages(question, row.location, parts=settings.image_column is not None)
        return _check_text(format_prompt(turns, settings=settings, prompt=bare), row.location)
    if not isinstance(question, str):
        kind = "null" if question is None else type(question).__name__
        raise NpoError(
            f"{row.location}: the prompt is a {kind}", "write a string, or a list of {role, content} messages"
        )
    if not question.strip():
        raise NpoError(f"{row.location}: the prompt is empty", "fill it in or remove the row")
    if settings.system and not settings.chat:
        raise NpoError(f"task.system needs chat prompts, but {row.location} is plain text", "set task.chat=true")
    return _check_text(format_prompt(question, settings=settings, prompt=bare), row.location)


def _cut_answer(answer: str, location: str, settings: TaskSettings) -> str:
    """What follows the last task.answer_mark."""
    if not settings.answer_mark:
        return answer
    _, mark, rest = answer.rpartition(settings.answer_mark)
    if not mark or not rest.strip():
        raise NpoError(
            f"{location}: nothing follows {settings.answer_mark!r} (task.answer_mark) in {settings.answer_column!r}",
            "fix the row, or remove task.answer_mark",
        )
    return rest.strip()


def _as_float(value: Any) -> Any:
    """A cell with its decimals as floats, as any JSON reader gives them."""
    if isinstance(value, dict):
        return {name: _as_float(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_as_float(each) for each in value]
    return float(value) if isinstance(value, Decimal) else value


def _check_text(prompt: Prompt, location: str) -> Prompt:
    """The prompt itself; an error if it holds half of a surrogate pair, which JSON allows and no tokenizer accepts."""
    for text in (prompt.prompt_id, prompt.answer, prompt.text or "", *(turn.content for turn in prompt.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = ascii(text[error.start])
            raise NpoError(
                f"{location} contains half of a surrogate pair ({surrogate})", "write the whole character, in UTF-8"
            ) from error
    return prompt


def _messages(turns: list[Any], location: str, *, parts: bool) -> list[Message]:
    """Chat messages. Content that would be lost (a tool call, an image without task.image_column) is an error."""
    messages = [
        _message(turn, f"{location}, message {number}", parts=parts) for number, turn in enumerate(turns, start=1)
    ]
    if not messages or not messages[-1].content.strip():
        raise NpoError(f"{location}: the prompt is empty", "fill it in or remove the row")
    if messages[-1].role in ("assistant", "system"):
        role = messages[-1].role
        raise NpoError(f"{location}: the last message is the {role}'s", "end the prompt with a user message")
    return messages


def _message(turn: object, location: str, *, parts: bool) -> Message:
    hint = 'write {"role": "user", "content": "..."}'
    if not isinstance(turn, dict):
        raise NpoError(f"{location} is not an object with role and content", hint)
    role, content = turn.get("role"), turn.get("content")
    if isinstance(content, list) and parts:
        content = join_parts(content, location)
    elif isinstance(content, list) and any(
        isinstance(part, dict) and "image" in str(part.get("type")) for part in content
    ):
        raise NpoError(f"{location} has an image, but task.image_column is not set", "set task.image_column=images")
    if not isinstance(role, str) or not role or not isinstance(content, str):
        raise NpoError(f"{location}: role and content must be strings", hint)
    extra = [key for key, value in turn.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise NpoError(f"{location} has {extra[0]!r}, which is not supported", f"remove it; {hint}")
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
        raise NpoError(
            f"{row.location}: {column!r} is a {kind}, not a string or a number",
            f"fix it, or set {key} to another column",
        )
    if not str(value).strip():
        raise NpoError(f"{row.location}: {column!r} is empty", "fill it in or remove the row")
    return str(value)


def check_unique_ids(located: Sequence[LocatedPrompt]) -> None:
    """Refuse two prompts with one id."""
    first: dict[str, str] = {}
    for prompt, location in located:
        if prompt.prompt_id in first:
            raise NpoError(
                f"{location} has the same prompt id {prompt.prompt_id!r} as {first[prompt.prompt_id]}",
                "make the ids unique, or remove task.id_column to number the rows",
            )
        first[prompt.prompt_id] = location


def check_disjoint(train: Sequence[LocatedPrompt], heldout: Sequence[LocatedPrompt]) -> None:
    """A held-out prompt that is also trained on would measure memorization."""
    trained = {without_id(prompt): location for prompt, location in train}
    for prompt, location in heldout:
        if without_id(prompt) in trained:
            raise NpoError(
                f"{location} (held out) has the same prompt as {trained[without_id(prompt)]} (training)",
                "remove one of the two rows",
            )


def without_id(prompt: Prompt) -> Prompt:
    """The prompt without what differs between two rows with the same question."""
    return replace(prompt, prompt_id="", answer="", row=0, images=drop_image_locations(prompt.images))
