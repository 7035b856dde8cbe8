"""Numbers as text: read exactly, never through a float, so 0.1 is 1/10 and twenty digits stay twenty digits.

Understood: a sign, thousands commas, decimals, an exponent, a plain fraction (`-1,234.5`, `6.02e23`, `3/4`).
Not understood, on purpose: LaTeX, per cent, units, words. `math_verify` is for those.
"""

import re
from fractions import Fraction

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
