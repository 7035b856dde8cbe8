"""Values of options as Python values."""

from npo_cli.errors import NpoError

MAX_DIGITS = 18
"""Of a step on the command line; Python refuses to read numbers of some thousand digits."""


def parse_steps(text: str, *, option: str = "--candidates") -> tuple[int, ...]:
    """`20,40,60` as steps."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < MAX_DIGITS for part in parts):
        raise NpoError(f"{option} takes comma-separated steps, got {text!r}", f"{option} 20,40,60")
    return tuple(map(int, parts))
