"""Verifiers that run in this process: equal texts, and equal numbers.

The verdict `wrong` means that an answer was found and differs, `unparseable` that none was found.

Numbers are read exactly, never through a float: 0.1 is 1/10, and twenty digits stay twenty digits. Supported: a sign,
thousands commas, decimals, an exponent, a plain fraction (`-1,234.5`, `6.02e23`, `3/4`). Not supported: LaTeX, percent
signs, units, words; `math_verify` reads those.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from npo_cli.tasks.base import UnusableAnswer, Verifier
from npo_cli.types.rollouts import Prompt, VerifierResult

MAX_CHARS = 400
"""Longer numbers are not read: the cost of exact arithmetic grows with the square of the length."""
MAX_EXPONENT = 400
"""Larger exponents are not read: 10**exponent is computed exactly, and `9e999999999` would not fit into memory."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
_UNSIGNED = rf"{_DECIMAL}(?:/{_DECIMAL})?"
_WHOLE = re.compile(rf"[+-]?{_UNSIGNED}")
# A digit glued to a letter is a name (x2), and a sign after a value is an operator (7-3).
_INSIDE = re.compile(rf"(?:(?<![A-Za-z0-9_)\]}}])[+-])?(?<![A-Za-z0-9_]){_UNSIGNED}")


def read_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number; None if it is not a number, too long, or divides by zero."""
    numeral = _ascii_sign(text.strip())
    if len(numeral) > MAX_CHARS or not _WHOLE.fullmatch(numeral):
        return None
    top, slash, bottom = numeral.replace(",", "").partition("/")
    if any(_exponent(part) > MAX_EXPONENT for part in (top, bottom)):
        return None
    denominator = Fraction(bottom) if slash else Fraction(1)
    return Fraction(top) / denominator if denominator else None


def last_numeral(text: str) -> str | None:
    """The last number in a text, as written (`The total is 1,024.` gives `1,024`); None if there is none."""
    found = _INSIDE.findall(_ascii_sign(text))
    return found[-1] if found else None


def _ascii_sign(text: str) -> str:
    """Replace the typographic minus sign."""
    return text.replace("\N{MINUS SIGN}", "-")


def _exponent(numeral: str) -> int:
    """Absolute value of the exponent; 0 without one."""
    digits = re.split("[eE]", numeral)[1:]
    return abs(int(digits[0])) if digits else 0


def grade_exact(answer: str, response: str) -> VerifierResult:
    """Equal texts, ignoring whitespace at both ends. An empty response is unparseable."""
    text = response.strip()
    if not text:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if text == answer.strip() else "wrong", extracted=text)


def grade_number(answer: str, response: str) -> VerifierResult:
    """The whole response is one number with exactly the answer's value: 0.50, 1/2 and .5 are equal."""
    return _compare_numbers(answer, response.strip())


def grade_last_number(answer: str, response: str) -> VerifierResult:
    """As `grade_number`, for the last number in the response."""
    return _compare_numbers(answer, last_numeral(response))


def _compare_numbers(answer: str, numeral: str | None) -> VerifierResult:
    value = None if numeral is None else read_number(numeral)
    if value is None:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if value == read_number(answer) else "wrong", extracted=numeral)


def is_number(answer: str) -> bool:
    """Whether an answer has an exact numeric value."""
    return read_number(answer) is not None


class FunctionVerifier(Verifier):
    """Grades in this process, one response at a time."""

    @staticmethod
    def grade_response(answer: str, response: str) -> VerifierResult:
        """The verdict for one response to a prompt with this reference answer."""
        raise NotImplementedError

    @staticmethod
    def is_readable(answer: str) -> bool:
        """Whether a response could match this reference answer."""
        return bool(answer.strip())

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        """Response by response."""
        pairs = zip(prompts, responses, strict=True)
        return [self.grade_response(prompt.answer, response) for prompt, response in pairs]

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Every reference answer is readable."""
        for prompt in prompts:
            if not self.is_readable(prompt.answer):
                raise UnusableAnswer(prompt, "a number")


class ExactVerifier(FunctionVerifier):
    """Equal texts."""

    name = "exact"
    grade_response = staticmethod(grade_exact)


class NumberVerifier(FunctionVerifier):
    """The response is one number."""

    name = "number"
    grade_response = staticmethod(grade_number)
    is_readable = staticmethod(is_number)


class LastNumberVerifier(FunctionVerifier):
    """The response ends with the number."""

    name = "last_number"
    grade_response = staticmethod(grade_last_number)
    is_readable = staticmethod(is_number)
