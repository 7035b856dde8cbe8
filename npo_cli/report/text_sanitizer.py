"""Text from models and files made harmless: no control characters, no change of direction, limited length.

Escaping for a terminal or for HTML is done by their own modules.
"""

import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
MAX_TEXT_CHARS = 4000
"""Characters of one text that are shown."""
_TAIL = 1000
"""How many of these come from the end of the text, where the answer is."""


def escape_control_chars(text: str, *, keep: str = "") -> str:
    """The text with every control, direction, unassigned and line-breaking character spelled out: `\\x1b[31m`.

    Characters in `keep` stay as they are.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _HIDDEN and char not in keep else char
        for char in text
    )


def truncate_middle(text: str, *, max_chars: int = MAX_TEXT_CHARS, tail_chars: int = _TAIL) -> str:
    """A text of more than `max_chars` characters without its middle, with a note of how much was left out."""
    left_out = len(text) - max_chars
    if left_out <= 0:
        return text
    return (
        f"{text[: max_chars - tail_chars]} [... {left_out:,} characters left out ...] {text[len(text) - tail_chars :]}"
    )
