"""SIGINT, SIGTERM and the program itself stop a run at the end of the step; a second signal stops it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from npo_cli.distributed.process_group import current_group


class StopFlag:
    """Set by a signal or by the program, and read between steps."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_requested = False
        """The program asked for it, not a signal."""

    def __bool__(self) -> bool:
        """All ranks ask together; the signal of rank 0 counts."""
        self.reason = current_group().broadcast(self.reason, phase="check for a signal")
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Stop after the current step; the first reason is kept."""
        if self.reason is None:
            self.reason, self.is_requested = reason, True

    def handle_signal(self, number: int, _frame: FrameType | None) -> None:
        """Record the first signal; raise at the second."""
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


def request_stop(reason: str) -> bool:
    """Stop an open run of this process as a signal does; False if none is open."""
    flag = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(flag, StopFlag):
        return False
    flag.reason = flag.reason or reason
    return True


@contextmanager
def stop_between_steps(flag: StopFlag | None = None) -> Iterator[StopFlag]:
    """Handle SIGINT and SIGTERM within the block; of several ranks in rank 0 alone.

    Python delivers signals to the main thread: in another thread only the program can set the flag.
    """
    flag = StopFlag() if flag is None else flag
    if not current_group().is_main or threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, flag.handle_signal) for number in numbers]
    try:
        yield flag
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
