"""Custom verifiers: `file.py:function`, called as function(prompt=, response=, answer=).

The file is user code, so it runs only with --allow-code (the unchanged one of `npo init` without), and in a process
that can be killed; what it prints goes to stderr. True, or a number of at least 1, is correct; anything less is wrong.
"""

import ast
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from npo_cli.errors import NpoError, RunFailed
from npo_cli.tasks.base import Verifier
from npo_cli.tasks.verifier_pool import VerifierPool, describe_error
from npo_cli.types.rollouts import Prompt, VerifierResult

SIGNATURE_HINT = "write def function(prompt, response, answer)"
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


class CustomVerifier(Verifier):
    """Calls the user's function. Its exceptions end the run: a reward of 0 instead would train on a bug."""

    name = "file.py:function"

    def __init__(self, pool: VerifierPool) -> None:
        self.pool = pool

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        """One call per response, in the pool."""
        calls = [
            {"prompt": prompt_text(prompt), "response": response, "answer": prompt.answer}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        verdicts = []
        for prompt, result in zip(prompts, self.pool.run(calls), strict=True):
            error = result.error or (result.value if isinstance(result.value, str) else None)
            if error:
                raise RunFailed(
                    f"the verifier failed on prompt {prompt.prompt_id}: {error}",
                    "fix the function, then continue with npo resume and --allow-code",
                )
            verdict = "timeout" if result.timed_out else "correct" if result.value >= 1 else "wrong"
            verdicts.append(VerifierResult(verdict=verdict))
        return verdicts

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Check that the function can be called; what it can compare is not known."""
        self.pool.start()

    def close(self) -> None:
        """End the pool."""
        self.pool.close()


def is_custom_verifier(verifier: str) -> bool:
    """Whether a setting names a function in a file."""
    return verifier.rpartition(":")[0].endswith(".py")


def make_custom_verifier(verifier: str, *, num_workers: int, timeout: float) -> CustomVerifier:
    """The verifier for `file.py:function`. The file is parsed here, and run only when the answers are checked."""
    file, _, function = verifier.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not _IS_CODE_ALLOWED.get() and not is_shipped_file(path):
        raise NpoError(
            f"task.verifier={verifier} is user code, which runs only with --allow-code",
            "read the file, then add --allow-code to the command",
        )
    if not path.is_file():
        raise NpoError(f"task.verifier names a file that does not exist: {path}", "fix the path before the colon")
    _require_function(path, function)
    build = partial(build_custom_check, str(path), function)
    return CustomVerifier(VerifierPool(build=build, num_workers=num_workers, timeout=timeout))


def is_shipped_file(path: Path) -> bool:
    """Whether a file is, byte for byte, the verifier that `npo init` writes: npo's own code needs no permission."""
    return path.is_file() and path.read_bytes() == PROJECT_VERIFIER.read_bytes()


def prompt_text(prompt: Prompt) -> str:
    """A prompt as plain text; for a chat, its messages separated by blank lines."""
    return prompt.text if prompt.text is not None else "\n\n".join(message.content for message in prompt.messages)


def build_custom_check(file: str, function: str) -> Callable[[dict[str, str]], float | str]:
    """In the worker process: run the file, and return a check that gives the function's number, or an error text."""
    import sys

    sys.path.insert(0, str(Path(file).parent))  # for imports from its folder
    spec = spec_from_file_location("npo_user_verifier", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    verifier = getattr(module, function)
    _require_signature(verifier, f"{file}: {function}")

    def check(call: dict[str, str]) -> float | str:
        try:
            value = verifier(**call)
        except (Exception, SystemExit) as error:
            return describe_error(error, inside=file)
        if isinstance(value, str) or not hasattr(value, "__float__") or math.isnan(float(value)):
            return f"{file}: {function} must return a bool or a number, it returned {value!r}"
        return float(value)

    return check


def _require_signature(verifier: object, name: str) -> None:
    if not callable(verifier):
        raise NpoError(f"{name} is not a function", SIGNATURE_HINT)
    try:
        inspect.signature(verifier).bind(prompt="", response="", answer="")
    except ValueError:
        return  # a C function without a signature
    except TypeError as error:
        raise NpoError(f"{name} must take prompt, response and answer: {error}", SIGNATURE_HINT) from error


def _require_function(path: Path, function: str) -> None:
    """Find the name in the syntax tree, so that a typo is found before sampling, without running the file."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        location = describe_error(error, inside=str(path))
        raise NpoError(f"task.verifier names a file that is not Python: {location}", "fix that line") from error
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
