"""Mathematical equality by Hugging Face's math-verify, behind a deadline that is kept.

Its own timeout is an alarm signal: useless outside the main thread and inside C code. So it is switched off, and
each comparison runs in a `VerifierPool`. The comparison is not symmetric: the reference answer goes first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from npo_cli.errors import NpoError
from npo_cli.tasks.verifier_pool import CheckResult, VerifierPool
from npo_cli.tasks.verifiers import UnusableAnswer
from npo_cli.types.rollouts import Prompt, VerifierResult

DELIMITERS = ("$", "\\boxed", "\\(", "\\[")
"""What marks LaTeX inside a text. A reference answer without any is taken as LaTeX as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MathVerifier:
    """Correct where math-verify finds the response's last answer equal to the reference."""

    pool: VerifierPool

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        pairs = [(prompt.answer, response) for prompt, response in zip(prompts, responses, strict=True)]
        return [_graded(outcome) for outcome in self.pool.run(pairs)]

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """A reference that is not read, or not in time, would make its prompt hopeless."""
        for prompt, is_read in zip(prompts, self.are_readable([prompt.answer for prompt in prompts]), strict=True):
            if not is_read:
                raise UnusableAnswer(prompt, "mathematics")

    def are_readable(self, answers: Sequence[str]) -> list[bool]:
        """Which reference answers are read, in time."""
        outcomes = self.pool.run([(answer, "") for answer in answers])
        return [not (each.timed_out or each.error or each.value[0] == "no_reference") for each in outcomes]

    def close(self) -> None:
        self.pool.close()


def make_math_verifier(*, num_workers: int, timeout: float) -> MathVerifier:
    """The grader, with nothing started yet."""
    if find_spec("math_verify") is None:
        raise NpoError(
            "the math_verify verifier needs the package math-verify, which is not installed",
            "pip install math-verify, or set task.verifier=last_number for plain numbers",
        )
    return MathVerifier(pool=VerifierPool(build=build_comparison, num_workers=num_workers, timeout=timeout))


def build_comparison() -> Callable[[tuple[str, str]], tuple[str, str | None]]:
    """In the worker: import, warm up the LaTeX parser, and return (answer, response) -> (verdict, extracted)."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off

    def read(text: str) -> list[Any]:
        return parse(text, parsing_timeout=None)

    def compare(pair: tuple[str, str]) -> tuple[str, str | None]:
        answer, response = pair
        gold = read(answer if any(mark in answer for mark in DELIMITERS) else f"\\boxed{{{answer}}}")
        if all(isinstance(part, str) for part in gold):
            return "no_reference", None
        said = read(response)
        extracted = next((part for part in said if isinstance(part, str)), None)
        if said and verify(gold, said, timeout_seconds=None):
            return "correct", extracted
        # Only a text came back: something stood where an answer stands, but it is no mathematics.
        unread = all(isinstance(part, str) for part in said)
        return ("unparseable" if unread else "wrong"), extracted

    compare(("\\frac{1}{2}", "$0.5$"))
    return compare


def _graded(outcome: CheckResult) -> VerifierResult:
    if outcome.timed_out:
        return VerifierResult(verdict="timeout")
    if outcome.error or outcome.value[0] == "no_reference":
        return VerifierResult(verdict="unparseable")
    verdict, extracted = outcome.value
    return VerifierResult(verdict=verdict, extracted=extracted)
