"""Text from models and files as text that can do nothing: no control of a terminal, no change of direction, no end.

It knows neither terminals nor HTML: what a letter means to them is theirs to quote.
"""

import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
MAX_TEXT_CHARS = 4000
"""Letters of one text that are shown."""
_TAIL = 1000
"""Of these, how many come from its end: that is where an answer stands."""


def escape_control_chars(text: str, *, keep: str = "") -> str:
    """The text with every control, direction, unassigned and line-breaking character spelled out: `\\x1b[31m`.

    Characters in `keep` stay as they are.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _HIDDEN and char not in keep else char
        for char in text
    )


def truncate_middle(text: str, *, max_chars: int = MAX_TEXT_CHARS, tail_chars: int = _TAIL) -> str:
    """A text of more than `longest` letters without its middle, and a note of how much that was."""
    left_out = len(text) - max_chars
    if left_out <= 0:
        return text
    return f"{text[: max_chars - tail_chars]} [... {left_out:,} letters left out ...] {text[len(text) - tail_chars :]}"
