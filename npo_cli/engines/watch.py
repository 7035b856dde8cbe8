"""A limit on calls that nothing inside this process can interrupt: past it the process says why, and ends.

A stage leaves whole lines and whole checkpoints at every moment, so ending here is as safe as `kill -9`.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT_EXIT_CODE = 1


@contextmanager
def exit_on_timeout(seconds: float, *, phase: str, hint: str) -> Iterator[None]:
    """Run the block; if it is still running after `seconds`, name the phase on stderr and leave the process."""
    # Whatever becomes of stderr in the meantime.
    terminal = os.dup(2)
    words = f"error: the engine hung while it was to {phase}: nothing after {seconds:g} s\n  try: {hint}\n"
    timer = threading.Timer(seconds, exit_process, (terminal, words))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.close(terminal)


def exit_process(terminal: int, words: str) -> None:
    """The end of a process whose engine hangs."""
    os.write(terminal, words.encode())
    os._exit(TIMEOUT_EXIT_CODE)
