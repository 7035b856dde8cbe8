"""The far end of a `CheckPool`: one process that checks what comes down its pipe until the pipe closes."""

import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from npo_cli.errors import NpoError

GRACE_SECONDS = 1.0
"""How long after its deadline a process ends itself, for when the one that should kill it is gone."""


def serve_checks(channel: Connection, build: Callable[[], Callable[[Any], Any]], timeout: float) -> None:
    """Build the check, say so, then answer every item with ("value", v) or ("error", text)."""
    _stand_alone()
    try:
        check = build()
    except Exception as error:
        channel.send(("broken", describe_error(error)))
        return
    channel.send(("ready", None))
    while True:
        try:
            item = channel.recv()
        except EOFError:
            return  # whoever asked is gone
        # The alarm is left to the kernel's default action, so it ends even a loop inside C code.
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE_SECONDS)
        try:
            reply = ("value", check(item))
        except Exception as error:
            reply = ("error", describe_error(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            channel.send(reply)
        except BrokenPipeError:
            return


def describe_error(error: BaseException, *, inside: str | None = None) -> str:
    """`file:line: Kind: message` of the innermost place an error went through, in the file `inside` if it did."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    if isinstance(error, NpoError):
        return error.message
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {text}" if error.filename else f"{inside}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename == inside] or frames
    return f"{ours[-1].filename}:{ours[-1].lineno}: {text}" if ours else text


def _stand_alone() -> None:
    """Leave the terminal's and the launcher's group: stopping is the business of the process that asked.

    The handlers do nothing rather than ignore, so that programs a check starts get the usual signals back.
    What a check prints goes to stderr: stdout belongs to the command's data.
    """
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.dup2(2, 1)
