"""Keeps a command alive as long as its parent, and not a moment longer: `keeper FOLDER COMMAND ...`

The parent holds the other end of this process's stdin. Whatever becomes of the parent, `kill -9` too, the pipe closes,
and the command with all its children is ended: they are one process group of their own. In the end FOLDER, which the
command worked in, is removed. Knows nothing of engines.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

TERMINATE_GRACE_SECONDS = 5.0
"""Seconds between asking a group to end and ending it."""


def main(folder: str, command: list[str]) -> int:
    """Run the command; end it when stdin ends. The exit code is the command's."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(child.pid,), daemon=True).start()
    # A signal to this process is for the group.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end_group(child.pid))
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # what the command left behind
    shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _end_with_parent(group: int) -> None:
    while os.read(0, 4096):
        pass
    _end_group(group)


def _end_group(group: int) -> None:
    _signal_group(group, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATE_GRACE_SECONDS
    while time.monotonic() < deadline and _signal_group(group, 0):
        time.sleep(0.05)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Whether anybody was there to be told."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
