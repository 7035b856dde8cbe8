"""The one error a user is meant to read."""

import shlex
from pathlib import Path


class NpoError(Exception):
    """A user's mistake or the world's: what is wrong, and the command or edit that fixes it."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"try: {hint}")  # a traceback, as in a notebook, shows it


class RunFailed(NpoError):
    """The request was valid but could not be finished (a full disk, a dead engine)."""

    exit_code = 1


class CallbackError(RunFailed):
    """A callback raised an exception, which is its `__cause__`; the training was saved and can be resumed."""


class StoppedEarly(NpoError):
    """A signal ended the run after a whole step; it can be resumed."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its type if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def quote_path(path: Path) -> str:
    """A path as it is typed in a shell, so that a hint can be pasted: `'my run'`."""
    return shlex.quote(str(path))


def damaged_checkpoint_hint(folder: Path) -> str:
    """The hint for a checkpoint that cannot be used: under another name it counts no more."""
    moved = folder.with_name(f"{folder.name}.damaged")
    return f"choose another step (npo index lists them), or set it aside: mv {quote_path(folder)} {quote_path(moved)}"
