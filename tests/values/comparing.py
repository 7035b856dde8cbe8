"""Comparison of two records, and the rounding with which they are stored."""

import math
from collections.abc import Iterator
from typing import Any

RELATIVE, ABSOLUTE = 1e-5, 1e-7
"""Floats are equal within RELATIVE; ABSOLUTE ignores rounding noise around zero, such as the loss of a first step."""
DIGITS = 7


def rounded(value: Any) -> Any:
    """The value with every float at 7 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value


def differences(expected: Any, found: Any, path: str = "") -> Iterator[str]:
    """One line per value that differs: where, what was expected, what was found."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in found:
                yield f"{path}/{key}: recorded {_short(expected[key])}, now missing"
            elif key not in expected:
                yield f"{path}/{key}: not recorded, now {_short(found[key])}"
            else:
                yield from differences(expected[key], found[key], f"{path}/{key}")
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            yield f"{path}: recorded {len(expected)} entries, now {len(found)}"
        for number, (one, other) in enumerate(zip(expected, found, strict=False)):
            yield from differences(one, other, f"{path}[{number}]")
    elif not _equal(expected, found):
        yield f"{path}: recorded {_short(expected)}, now {_short(found)}"


def _equal(expected: Any, found: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (expected, found))
    if numbers and float in (type(expected), type(found)):
        return math.isclose(expected, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return type(expected) is type(found) and expected == found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
