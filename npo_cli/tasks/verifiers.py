"""Verdicts on responses: the interface every grader has, and the graders that need no other process.

A judge compares one response with one reference answer. A grader does so for a batch; those that may hang or
crash do it elsewhere (`math_pool`, `user_code`, `gym`). *Wrong* means read and different, *unparseable* means
that there was nothing to compare.

Numbers as text: read exactly, never through a float, so 0.1 is 1/10 and twenty digits stay twenty digits.

Understood: a sign, thousands commas, decimals, an exponent, a plain fraction (`-1,234.5`, `6.02e23`, `3/4`).
Not understood, on purpose: LaTeX, per cent, units, words. `math_verify` is for those.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from npo_cli.errors import NpoError
from npo_cli.tasks.micro import final_answer
from npo_cli.types.rollouts import Prompt, VerifierResult

MAX_CHARS = 400
"""A longer numeral is not read: the cost of exact arithmetic grows with the square of it."""
MAX_EXPONENT = 400
"""10**exponent is written out in full, so an answer of `9e999999999` must not be."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
_UNSIGNED = rf"{_DECIMAL}(?:/{_DECIMAL})?"
_WHOLE = re.compile(rf"[+-]?{_UNSIGNED}")
# A digit glued to a letter is a name (x2), and a sign after a value is an operator (7-3).
_INSIDE = re.compile(rf"(?:(?<![A-Za-z0-9_)\]}}])[+-])?(?<![A-Za-z0-9_]){_UNSIGNED}")


def read_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number; None where it is none, too long, or divides by zero."""
    numeral = _ascii_sign(text.strip())
    if len(numeral) > MAX_CHARS or not _WHOLE.fullmatch(numeral):
        return None
    top, slash, bottom = numeral.replace(",", "").partition("/")
    if any(_exponent(part) > MAX_EXPONENT for part in (top, bottom)):
        return None
    denominator = Fraction(bottom) if slash else Fraction(1)
    return Fraction(top) / denominator if denominator else None


def last_numeral(text: str) -> str | None:
    """The last number written in a text, as it is written (`The total is 1,024.` gives `1,024`); None if none is."""
    found = _INSIDE.findall(_ascii_sign(text))
    return found[-1] if found else None


def _ascii_sign(text: str) -> str:
    """Language models also write the typographic minus."""
    return text.replace("\N{MINUS SIGN}", "-")


def _exponent(numeral: str) -> int:
    """Size of the power of ten, 0 without one."""
    digits = re.split("[eE]", numeral)[1:]
    return abs(int(digits[0])) if digits else 0


GradeFunction = Callable[[str, str], VerifierResult]
"""(reference answer, response) -> verdict."""


class UnusableAnswer(NpoError):
    """A reference answer that the chosen verifier cannot read."""

    def __init__(self, prompt: Prompt, wanted: str) -> None:
        shown = prompt.answer if len(prompt.answer) <= 60 else f"{prompt.answer[:60]}..."
        super().__init__(
            f"the reference answer of prompt {prompt.prompt_id} is not {wanted} the verifier can read: {shown!r}",
            "mend that answer, or choose another task.verifier (exact compares texts as they are)",
        )
        self.prompt = prompt


class Verifier(Protocol):
    """Verifies responses, in the order given. `close` ends its processes; one that has none does nothing."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]: ...

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Refuse reference answers that no response could ever match."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionVerifier:
    """Grades in this process, one response at a time."""

    grade_response: GradeFunction
    is_readable: Callable[[str], bool] = bool
    """Whether a reference answer can be compared at all."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        return [
            self.grade_response(prompt.answer, response) for prompt, response in zip(prompts, responses, strict=True)
        ]

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not self.is_readable(prompt.answer):
                raise UnusableAnswer(prompt, "a number")

    def close(self) -> None:
        pass


def grade_exact(answer: str, response: str) -> VerifierResult:
    """Equal texts, blanks at both ends apart. An empty response is unparseable."""
    said = response.strip()
    if not said:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if said == answer.strip() else "wrong", extracted=said)


def grade_number(answer: str, response: str) -> VerifierResult:
    """The whole response is one number, of exactly the answer's value: 0.50, 1/2 and .5 are one answer."""
    return _compare_numbers(answer, response.strip())


def grade_last_number(answer: str, response: str) -> VerifierResult:
    """As `judge_number`, for the last number written in the response."""
    return _compare_numbers(answer, last_numeral(response))


def grade_micro(answer: str, response: str) -> VerifierResult:
    """What follows the one `#` of a scratchpad is the answer, digit for digit. No `#`, or several: unparseable."""
    said = final_answer(response)
    if said is None:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if said == answer else "wrong", extracted=said)


def _compare_numbers(answer: str, numeral: str | None) -> VerifierResult:
    value = None if numeral is None else read_number(numeral)
    if value is None:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if value == read_number(answer) else "wrong", extracted=numeral)


def is_number(answer: str) -> bool:
    """Whether an answer has an exact numeric value."""
    return read_number(answer) is not None


BUILTIN_VERIFIERS = {
    "exact": FunctionVerifier(grade_response=grade_exact, is_readable=lambda answer: bool(answer.strip())),
    "number": FunctionVerifier(grade_response=grade_number, is_readable=is_number),
    "last_number": FunctionVerifier(grade_response=grade_last_number, is_readable=is_number),
    "micro": FunctionVerifier(grade_response=grade_micro),
}
"""The graders that work in this process, by their name in a recipe."""
