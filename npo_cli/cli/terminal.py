"""Lines on the terminal: data on stdout, status on stderr.

Text from models and files is data: control characters are escaped, markup is not interpreted.
"""

import os
import sys
from typing import TextIO

from npo_cli.report.text_sanitizer import escape_control_chars
from npo_cli.session.stop_signal import request_stop


def escape_for_terminal(text: str) -> str:
    """The text in one line, with control characters escaped: `\\x1b[31m`."""
    return escape_control_chars(text)


def print_data(text: str) -> None:
    """Print one line on stdout."""
    _print_line(text, sys.stdout)


def print_status(text: str, *, style: str = "") -> None:
    """Print one line on stderr, in an ANSI style (such as `1;31`) on a color terminal."""
    is_colored = bool(style) and is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")
    _print_line(f"\x1b[{style}m{text}\x1b[0m" if is_colored else text, sys.stderr)


def _print_line(text: str, stream: TextIO) -> None:
    """Print; where nobody reads on (`npo train ... | head -1`), an open run is stopped as by SIGTERM."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        if not request_stop("SIGPIPE"):
            raise
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stream.fileno())  # what is still to come is discarded


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
