"""Lines on the terminal: data on stdout, status on stderr.

Text from models and files is data: control characters are escaped, markup is not interpreted.
"""

import os
import sys
from typing import TextIO

from npo_cli.report.text_sanitizer import escape_control_chars


def escape_for_terminal(text: str) -> str:
    """The text in one line, with control characters escaped: `\\x1b[31m`."""
    return escape_control_chars(text)


def print_data(text: str) -> None:
    """Print one line on stdout."""
    print(text, flush=True)


def print_status(text: str, *, style: str = "") -> None:
    """Print one line on stderr, in an ANSI style (such as `1;31`) on a color terminal."""
    is_colored = bool(style) and is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")
    print(f"\x1b[{style}m{text}\x1b[0m" if is_colored else text, file=sys.stderr, flush=True)


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
