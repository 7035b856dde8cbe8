"""Custom tasks: `file.py:function` or `module:function` returns the rows, and optionally a verifier.

    def load(seed):
        rows = [{"prompt": "1+1=", "answer": "2"}, ...]  # or an iterator, which may be endless
        return rows  # or {"rows": rows, "heldout": rows, "verifier": grade}, the last two being optional

The function is user code: it runs in a process of its own, and only with --allow-code (`code_permission.py`).
"""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.base import LoadedPrompts, TaskSource
from npo_cli.tasks.custom_verifier import (
    CustomVerifier,
    check_code,
    find_code,
    load_code,
    open_custom_pool,
)
from npo_cli.tasks.file_dataset import (
    LocatedPrompt,
    check_disjoint,
    check_num_rows,
    check_unique_ids,
    make_prompt,
    needs_answers,
)
from npo_cli.tasks.table_io import TableRow
from npo_cli.tasks.verifier_pool import VerifierPool, describe_error
from npo_cli.types.rollouts import Prompt

LOAD_SECONDS = 600.0
"""Timeout of the function."""
RESULT_HINT = 'return a list of {"prompt": ..., "answer": ...}, or {"rows": ..., "heldout": ..., "verifier": function}'


class CustomTask(TaskSource):
    """Rows that a function of the user returns."""

    name = "custom"
    default_verifier = "math_verify"

    @classmethod
    def validate(cls, settings: TaskSettings) -> None:
        """There is such a function, and it may run."""
        super().validate(settings)
        if not settings.function:
            raise NpoError(
                "task.source=custom needs a function", "set task.function to file.py:function or module:function"
            )
        check_code(settings.function, "task.function")

    @classmethod
    def list_code(cls, settings: TaskSettings) -> tuple[str, ...]:
        """The function."""
        return () if settings.function is None else (settings.function,)

    @classmethod
    def choose_verifier(cls, loaded: LoadedPrompts) -> str:
        """The function's own verifier, if it returned one."""
        return cls.default_verifier if loaded.verifier_data is None else TaskVerifier.name

    @classmethod
    def load(cls, settings: TaskSettings, *, seed: int) -> LoadedPrompts:
        """The first task.pool_size rows are trained on, the next task.heldout_size held out, unless `heldout` is given.

        Of fewer rows the last ones are held out.
        """
        assert settings.function is not None
        found = _call_function(settings, seed)
        verifier = cls.default_verifier if found["verifier"] is None else TaskVerifier.name
        needs_answer = needs_answers(settings, default_verifier=verifier)
        rows = _make_prompts(found["rows"], settings, "rows", needs_answer=needs_answer)
        if found["heldout"] is None:
            check_num_rows(
                len(rows), settings.heldout_size, source=f"{settings.function} returned", hint=", or return more rows"
            )
            num_train = len(rows) - settings.heldout_size
            train, heldout = rows[:num_train], rows[num_train:]
        else:
            train, heldout = rows, _make_prompts(found["heldout"], settings, "heldout", needs_answer=needs_answer)
        check_unique_ids([*train, *heldout])
        check_disjoint(train, heldout)
        return LoadedPrompts(
            train=tuple(prompt for prompt, _ in train),
            heldout=tuple(prompt for prompt, _ in heldout),
            verifier_data=found["verifier"],
        )

    @classmethod
    def locate(cls, prompt: Prompt, settings: TaskSettings) -> str:
        """`tasks.py:load row 3: `."""
        return f"{settings.function} {prompt.prompt_id.partition('/')[0]} {prompt.row + 1}: "


class TaskVerifier(CustomVerifier):
    """The verifier that the function of a custom task returned."""

    name = "custom"
    sources = ("custom",)

    @classmethod
    def open(cls, settings: TaskSettings, loaded: LoadedPrompts) -> "TaskVerifier":
        """Its process starts when the answers are checked."""
        if loaded.verifier_data is None:
            raise NpoError(f"{settings.function} returned no verifier", f"set task.verifier=auto, or {RESULT_HINT}")
        assert settings.function is not None
        return open_custom_pool(cls, find_code(settings.function), loaded.verifier_data, settings, loaded)


def _make_prompts(
    rows: Sequence[Mapping[str, Any]], settings: TaskSettings, prefix: str, *, needs_answer: bool
) -> list[LocatedPrompt]:
    located = [
        TableRow(position=at, location=f"{settings.function} {prefix} {at + 1}", values=dict(values))
        for at, values in enumerate(rows)
    ]
    return [
        (make_prompt(row, settings, f"{prefix}/{row.position:06d}", needs_answer=needs_answer), row.location)
        for row in located
    ]


def _call_function(settings: TaskSettings, seed: int) -> dict[str, Any]:
    """`rows`, `heldout` (None: none) and `verifier` (a name, or None)."""
    assert settings.function is not None
    build = partial(build_call, find_code(settings.function), settings.function.rpartition(":")[2])
    sizes = (settings.pool_size, settings.heldout_size)
    pool = VerifierPool(build=build, num_workers=1, timeout=LOAD_SECONDS)
    try:
        (result,) = pool.run([(dict(settings.function_args), seed, *sizes)])
    finally:
        pool.close()
    if result.timed_out:
        raise NpoError(
            f"{settings.function} (task.function) returned nothing in {LOAD_SECONDS:g} s",
            "see its output above; write slow results to a file, and read them in the function",
        )
    if result.error:
        raise NpoError(f"{settings.function} (task.function) failed: {result.error}", "fix the function")
    kind, payload = result.value
    if kind == "refused":
        raise NpoError(f"{settings.function} (task.function) {payload}", RESULT_HINT)
    return json.loads(payload)


# In the process of the function


def build_call(code: str, name: str) -> Callable[[tuple[dict[str, Any], int, int, int]], tuple[str, str]]:
    """A call of the function that gives ("rows", JSON) or ("refused", what is wrong with its result)."""

    def call(item: tuple[dict[str, Any], int, int, int]) -> tuple[str, str]:
        arguments, seed, pool_size, heldout_size = item
        try:
            module = load_code(code)
            function = getattr(module, name)
            if "seed" in inspect.signature(function).parameters:
                arguments = {"seed": seed, **arguments}
            result = function(**arguments)
            return "rows", _read_result(result, module, pool_size, heldout_size)
        except _InvalidResult as error:
            return "refused", str(error)
        except SystemExit as error:
            raise RuntimeError(describe_error(error, inside=code)) from error

    return call


class _InvalidResult(Exception):
    """What the function returned is no task."""


def _read_result(result: Any, module: Any, pool_size: int, heldout_size: int) -> str:
    parts = dict(result) if isinstance(result, Mapping) else {"rows": result}
    unknown = [key for key in parts if key not in ("rows", "heldout", "verifier")]
    if unknown or "rows" not in parts:
        raise _InvalidResult(f"returned a dict with {unknown[0]!r}" if unknown else "returned a dict without 'rows'")
    heldout, verifier = parts.get("heldout"), parts.get("verifier")
    name = getattr(verifier, "__name__", "")
    if verifier is not None and getattr(module, name, None) is not verifier:
        raise _InvalidResult(f"returned the verifier {verifier!r}, which is no function of its file by that name")
    num_rows = pool_size + (heldout_size if heldout is None else 0)
    found = {
        "rows": _read_rows(parts["rows"], num_rows),
        "heldout": None if heldout is None else _read_rows(heldout, heldout_size),
        "verifier": None if verifier is None else name,
    }
    return json.dumps(found, default=_to_plain)


def _read_rows(rows: Any, limit: int) -> list[dict[str, Any]]:
    """The first rows; each is a dict that JSON can hold."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise _InvalidResult(f"returned a {type(rows).__name__}, not rows")
    found = list(islice(rows, limit))
    if not found:
        raise _InvalidResult("returned no rows")
    for number, row in enumerate(found, start=1):
        if not isinstance(row, Mapping):
            raise _InvalidResult(f"returned a {type(row).__name__} as row {number}, not a dict")
        try:
            json.dumps(dict(row), default=_to_plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise _InvalidResult(f"returned row {number} with a value that JSON cannot hold: {error}") from error
    return [dict(row) for row in found]


def _to_plain(value: Any) -> Any:
    """A number of numpy, as Python's."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    raise TypeError(f"a {type(value).__name__}")
