"""A limit on calls that nothing inside this process can interrupt: past it the process says why, and ends.

A stage leaves whole lines and whole checkpoints at every moment, so ending here is as safe as `kill -9`.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 1


@contextmanager
def within(seconds: float, *, phase: str, mend: str) -> Iterator[None]:
    """Run the block; if it is still running after `seconds`, name the phase on stderr and leave the process."""
    timer = threading.Timer(seconds, give_up, (seconds, phase, mend))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def give_up(seconds: float, phase: str, mend: str) -> None:
    """The last words of a process whose engine hangs."""
    text = f"error: the engine hung while it was to {phase}: nothing after {seconds:g} s\nhint: {mend}\n"
    os.write(2, text.encode())
    os._exit(EXIT_CODE)
