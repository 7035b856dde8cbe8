"""Lines on the terminal: data on stdout, status on stderr; how much of the status is shown, and in color or not.

Text from models and files is data: control characters are escaped, markup is not interpreted.
"""

import contextlib
import os
import shutil
import sys
import textwrap
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, TextIO

from npo_cli.report.text_sanitizer import escape_control_chars
from npo_cli.session.stop_signal import request_stop

if TYPE_CHECKING:
    from rich.console import Console

Verbosity = Literal["quiet", "normal", "verbose"]
VERBOSITY: ContextVar[Verbosity] = ContextVar("verbosity", default="normal")
"""--quiet shows results, warnings and errors only; --verbose also each step, and how long loading and saving took."""
COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())
"""What was typed after `npo`."""
LOADING = "loading ..."
DEFAULT_WIDTH = 80
"""Of a terminal that does not say."""
CLEAR_LINE = "\r\x1b[2K"
_LOADING_STREAM: list[TextIO] = []
"""Where the line `loading ...` is shown."""


def escape_for_terminal(text: str) -> str:
    """The text in one line, with control characters escaped: `\\x1b[31m`."""
    return escape_control_chars(text)


def print_data(text: str) -> None:
    """Print one line on stdout."""
    _print_line(text, sys.stdout)


def print_status(text: str, *, style: str = "", wraps: bool = True) -> None:
    """Print one line on stderr, in an ANSI style (such as `1;31`) where colors are shown.

    On a terminal that is narrower it is cut between words, unless `wraps` is false, as for a command to be copied.
    """
    for line in wrap_words(text, terminal_width(sys.stderr)) if wraps else [text]:
        _print_line(f"\x1b[{style}m{line}\x1b[0m" if style and has_color(sys.stderr) else line, sys.stderr)


def print_notice(text: str) -> None:
    """Print one line on stderr that --quiet leaves out."""
    if VERBOSITY.get() != "quiet":
        print_status(text)


def show_loading() -> None:
    """On a terminal, a line on stderr until something else is printed: torch is imported, a model is loaded."""
    if is_terminal(sys.stderr):
        print(LOADING, end="", file=sys.stderr, flush=True)
        _LOADING_STREAM.append(sys.stderr)


def clear_loading() -> None:
    """Erase that line, before anything else is printed."""
    while _LOADING_STREAM:
        print(CLEAR_LINE, end="", file=_LOADING_STREAM.pop(), flush=True)


def open_console(*, width: int | None = None) -> "Console":
    """stdout for what rich lays out."""
    from rich.console import Console

    clear_loading()
    return Console(highlight=False, width=width)


def _print_line(text: str, stream: TextIO) -> None:
    """Print; where nobody reads on (`npo train ... | head -1`), an open run is stopped as by SIGTERM."""
    try:
        clear_loading()
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        if not request_stop("SIGPIPE"):
            raise
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stream.fileno())  # what is still to come is discarded


def terminal_width(stream: TextIO) -> int | None:
    """Characters per line of a terminal; None of anything else."""
    if not is_terminal(stream):
        return None
    size = os.terminal_size((0, 0))
    with contextlib.suppress(OSError):
        size = os.get_terminal_size(stream.fileno())
    return shutil.get_terminal_size(fallback=size).columns or DEFAULT_WIDTH


def wrap_words(text: str, width: int | None) -> list[str]:
    """Lines of at most `width` characters, cut between words; longer words, and a text of several lines, stay whole."""
    if width is None or len(text) <= width or "\n" in text:
        return [text]
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_color(stream: TextIO) -> bool:
    """Whether colors are shown: NO_COLOR (never) and FORCE_COLOR (also in a pipe) count where they are not empty."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_terminal(stream)
