"""A command of a bench ends like one that got SIGTERM, saved, when the bench ends, however that ends."""

import os
import signal
import threading


def end_with_parent(lifeline: int) -> None:
    """Send this process SIGTERM when the other end of the pipe closes."""

    def wait() -> None:
        os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
