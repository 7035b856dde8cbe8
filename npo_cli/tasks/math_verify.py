"""Mathematical equality by Hugging Face's math-verify, with a timeout that always works.

math-verify's own timeout is an alarm signal, which does nothing outside the main thread or inside C code. So it is
disabled, and each comparison runs in a `VerifierPool`. The comparison is not symmetric: the reference goes first.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.base import LoadedPrompts, UnusableAnswer, Verifier
from npo_cli.tasks.verifier_pool import CheckResult, VerifierPool
from npo_cli.types.rollouts import Prompt, VerifierResult

DELIMITERS = ("$", "\\boxed", "\\(", "\\[")
"""Delimiters of LaTeX in a text. A reference answer without any is read as LaTeX as a whole."""


class MathVerifier(Verifier):
    """Correct if math-verify finds the response's last answer equal to the reference."""

    name = "math_verify"

    def __init__(self, pool: VerifierPool) -> None:
        self.pool = pool

    @classmethod
    def open(cls, settings: TaskSettings, loaded: LoadedPrompts | None = None) -> "MathVerifier":
        """The package is installed; no process is started yet."""
        if find_spec("math_verify") is None:
            raise NpoError(
                "task.verifier=math_verify needs the package math-verify, which is not installed",
                "pip install math-verify, or set task.verifier=last_number for plain numbers",
            )
        return cls(
            VerifierPool(build=build_comparison, num_workers=settings.verify_workers, timeout=settings.verify_timeout)
        )

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        """Compare in the pool."""
        pairs = [(prompt.answer, response) for prompt, response in zip(prompts, responses, strict=True)]
        return [_to_verdict(result) for result in self.pool.run(pairs)]

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Every reference answer can be read, within the timeout."""
        are_readable = self.are_readable([prompt.answer for prompt in prompts])
        for prompt, is_readable in zip(prompts, are_readable, strict=True):
            if not is_readable:
                raise UnusableAnswer(prompt, "mathematics")

    def are_readable(self, answers: Sequence[str]) -> list[bool]:
        """For each reference answer whether it can be read within the timeout."""
        results = self.pool.run([(answer, "") for answer in answers])
        return [not (each.timed_out or each.error or each.value[0] == "no_reference") for each in results]

    def close(self) -> None:
        """End the pool."""
        self.pool.close()


def build_comparison() -> Callable[[tuple[str, str]], tuple[str, str | None]]:
    """In the worker process: import, warm up the parser, and return (answer, response) -> (verdict, extracted)."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are disabled

    def read(text: str) -> list[Any]:
        return parse(text, parsing_timeout=None)

    def compare(pair: tuple[str, str]) -> tuple[str, str | None]:
        answer, response = pair
        gold = read(answer if any(mark in answer for mark in DELIMITERS) else f"\\boxed{{{answer}}}")
        if all(isinstance(part, str) for part in gold):
            return "no_reference", None
        parsed = read(response)
        extracted = next((part for part in parsed if isinstance(part, str)), None)
        if parsed and verify(gold, parsed, timeout_seconds=None):
            return "correct", extracted
        # Only strings: there is something in the answer's place, but it is not mathematics.
        is_unparseable = all(isinstance(part, str) for part in parsed)
        return ("unparseable" if is_unparseable else "wrong"), extracted

    compare(("\\frac{1}{2}", "$0.5$"))
    return compare


def _to_verdict(result: CheckResult) -> VerifierResult:
    if result.timed_out:
        return VerifierResult(verdict="timeout")
    if result.error or result.value[0] == "no_reference":
        return VerifierResult(verdict="unparseable")
    verdict, extracted = result.value
    return VerifierResult(verdict=verdict, extracted=extracted)
