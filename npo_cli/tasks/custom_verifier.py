"""Custom verifiers: `file.py:function`, a reward function with one of three signatures (`reward_functions.py`).

The file is user code, so it runs only with --allow-code, given once per run and content of the file
(`code_permission.py`; the unchanged one of `npo init` needs none), and in a process that can be killed; what it prints
goes to stderr.
"""

import ast
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, TypeVar

from npo_cli.errors import NpoError, RunFailed
from npo_cli.tasks.base import LoadedPrompts, UnusableAnswer, Verifier
from npo_cli.tasks.code_permission import has_changed, is_permitted
from npo_cli.tasks.reward_functions import InvalidReward, RewardCall, make_reward_call, wrap_function
from npo_cli.tasks.verifier_pool import VerifierPool, describe_error
from npo_cli.types.rollouts import Prompt, VerifierResult

if TYPE_CHECKING:
    from npo_cli.config.recipe import TaskSettings

ROW_SOURCES = ("file", "custom")
"""Values of task.source whose prompts are rows of the user."""
PROJECT_VERIFIER = Path(__file__).parents[1] / "assets" / "project" / "grade.py"
_IS_CODE_ALLOWED: ContextVar[bool] = ContextVar("is_code_allowed", default=False)


def permit_code() -> None:
    """Allow custom verifiers to run until the current context ends (option --allow-code)."""
    _IS_CODE_ALLOWED.set(True)


@contextmanager
def code_permitted() -> Iterator[None]:
    """Allow custom verifiers to run within the block."""
    before = _IS_CODE_ALLOWED.set(True)
    try:
        yield
    finally:
        _IS_CODE_ALLOWED.reset(before)


AnyCustom = TypeVar("AnyCustom", bound="CustomVerifier")


class CustomVerifier(Verifier):
    """Calls the user's function. Its exceptions end the run: a reward of 0 instead would train on a bug."""

    name = "file.py:function"
    needs_answer = False
    uses_threshold = True

    def __init__(
        self, pool: VerifierPool, *, data_source: str, column_names: Sequence[str], has_answers: bool = True
    ) -> None:
        self.pool, self.data_source, self.column_names = pool, data_source, column_names
        self.has_answers = has_answers

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult | None]:
        """One call per response, in the pool."""
        calls = [
            make_reward_call(
                prompt,
                response,
                data_source=self.data_source,
                column_names=self.column_names,
                has_answers=self.has_answers,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        results: list[VerifierResult | None] = []
        for prompt, result in zip(prompts, self.pool.run(calls), strict=True):
            error = result.error or (result.value if isinstance(result.value, str) else None)
            if error:
                raise RunFailed(
                    f"the verifier failed on prompt {prompt.prompt_id}: {error}",
                    "fix the function, then continue with npo resume and --allow-code",
                )
            results.append(VerifierResult(verdict="timeout") if result.timed_out else result.value)
        return results

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Load the file and check the function's signature; rows of data all have an answer, or none has."""
        lacking = next((prompt for prompt in prompts if not prompt.answer), None)
        if lacking is not None and self.has_answers and self.data_source in ROW_SOURCES:
            raise UnusableAnswer(lacking)
        self.pool.start()

    def close(self) -> None:
        """End the pool."""
        self.pool.close()


def is_custom_verifier(verifier: str) -> bool:
    """Whether a setting names a function in a file."""
    return verifier.rpartition(":")[0].endswith(".py")


def is_code_allowed(verifier: str) -> bool:
    """Whether `file.py:function` may run: with --allow-code now or earlier in the run (`code_permission.py`), or if it
    is the unchanged one of `npo init`."""
    path = code_path(verifier)
    return path is None or has_allow_code() or is_shipped_file(path) or is_permitted(path)


def has_allow_code() -> bool:
    """Whether the command has --allow-code."""
    return _IS_CODE_ALLOWED.get()


def verifier_path(verifier: str) -> Path:
    """The file of `file.py:function`."""
    return Path(verifier.rpartition(":")[0]).expanduser().resolve()


def find_code(code: str) -> str:
    """The file of `file.py:function`, or the module of `module:function`: what `load_code` takes."""
    return str(verifier_path(code)) if is_custom_verifier(code) else code.rpartition(":")[0]


def code_path(code: str) -> Path | None:
    """The file whose content --allow-code permits; None if there is no such module. Nothing is imported."""
    if is_custom_verifier(code):
        return verifier_path(code)
    spec, folders, name = None, None, ""
    for part in code.rpartition(":")[0].split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            return None
        folders = spec.submodule_search_locations
    return Path(spec.origin).resolve() if spec is not None and spec.origin else None


def check_code(code: str, setting: str) -> None:
    """Refuse user code that was not allowed to run, or is not there; nothing is run."""
    module, _, function = code.rpartition(":")
    if not module or not function.isidentifier():
        raise NpoError(f"{setting}={code} names no function", "write file.py:function or module:function")
    path = code_path(code)
    if path is not None and has_changed(path) and not is_code_allowed(code):
        raise NpoError(
            f"{path} ({setting}) has changed since --allow-code was given for this run",
            "read the file, then add --allow-code to the command again",
        )
    if not is_code_allowed(code):
        raise NpoError(
            f"{setting}={_shorten(code)} is user code, which runs only with --allow-code",
            "read the file, then add --allow-code to the command",
        )
    if path is None:
        raise NpoError(f"{setting} names a module that is not installed: {module}", "install it, or write file.py")
    if not path.is_file():
        raise NpoError(f"{setting} names a file that does not exist: {path}", "fix the path before the colon")
    _require_function(path, function, setting)


def _shorten(code: str) -> str:
    """`file.py:function` from the current folder, where the file is below it: recipes hold absolute paths."""
    path, folder = Path(code.rpartition(":")[0]), Path.cwd()
    return code.replace(f"{folder}{os.sep}", "", 1) if path.is_relative_to(folder) else code


def check_verifier_file(verifier: str) -> None:
    """Refuse `file.py:function` if there is no such file, or no such function in it; nothing is run."""
    path = verifier_path(verifier)
    if not path.is_file():
        raise NpoError(f"task.verifier names a file that does not exist: {path}", "fix the path before the colon")
    _require_function(path, verifier.rpartition(":")[2])


def make_custom_verifier(verifier: str, settings: "TaskSettings", loaded: LoadedPrompts) -> CustomVerifier:
    """The verifier for `file.py:function`. The file is parsed here, and run only when the answers are checked."""
    check_code(verifier, "task.verifier")
    return open_custom_pool(CustomVerifier, find_code(verifier), verifier.rpartition(":")[2], settings, loaded)


def open_custom_pool(
    kind: type[AnyCustom], code: str, function: str, settings: "TaskSettings", loaded: LoadedPrompts
) -> AnyCustom:
    """The verifier for a function of a file or module; the code runs only when the answers are checked."""
    prompts = (*loaded.train, *loaded.heldout)
    columns = tuple(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    has_answers = settings.source not in ROW_SOURCES or any(prompt.answer for prompt in prompts)
    missing = "" if has_answers else settings.answer_column
    build = partial(build_custom_check, code, function, settings.correct_threshold, columns, missing)
    pool = VerifierPool(build=build, num_workers=settings.verify_workers, timeout=settings.verify_timeout)
    return kind(pool, data_source=settings.source, column_names=columns, has_answers=has_answers)


def is_shipped_file(path: Path) -> bool:
    """Whether a file is, byte for byte, the verifier that `npo init` writes: npo's own code needs no permission."""
    return path.is_file() and path.read_bytes() == PROJECT_VERIFIER.read_bytes()


def build_custom_check(
    file: str, function: str, correct_threshold: float, column_names: Sequence[str], missing_answers: str = ""
) -> Callable[[RewardCall], VerifierResult | str | None]:
    """In the worker process: run the file, and return a check that gives the function's result, or an error text.

    `missing_answers`: the name of the answer column where the data has none.
    """
    module = load_code(file)
    reward = wrap_function(
        getattr(module, function),
        f"{file}: {function}",
        correct_threshold=correct_threshold,
        column_names=column_names,
        missing_answers=missing_answers,
    )

    def check(call: RewardCall) -> VerifierResult | str | None:
        try:
            return reward(call)
        except InvalidReward as error:
            return str(error)
        except (Exception, SystemExit) as error:
            return describe_error(error, inside=file)

    return check


class _SourceLoader(SourceFileLoader):
    """Runs the file that was checked and permitted: byte code beside it is neither read nor written."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_code(code: str) -> ModuleType:
    """Run a file, or import a module."""
    import sys

    if not code.endswith(".py"):
        return import_module(code)
    sys.path.insert(0, str(Path(code).parent))  # for imports from its folder
    loader = _SourceLoader("npo_user_code", code)
    spec = spec_from_file_location("npo_user_code", code, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _require_function(path: Path, function: str, setting: str = "task.verifier") -> None:
    """Find the name in the syntax tree, so that a typo is found before sampling, without running the file."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        is_syntax = isinstance(error, SyntaxError)  # null bytes are a ValueError up to Python 3.11.3
        location = describe_error(error, inside=str(path)) if is_syntax else f"{path}: SyntaxError: {error}"
        raise NpoError(f"{setting} names a file that is not Python: {location}", "fix that line") from error
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        for alias in getattr(node, "names", [])
        if isinstance(alias, ast.alias)
    }
    if function not in names and "*" not in names:
        defined = ", ".join(sorted(names)) or "(it defines nothing)"
        raise NpoError(f"{path} has no function {function!r}", f"write {path.name}:NAME with one of: {defined}")
