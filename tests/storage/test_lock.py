import os
import signal
import subprocess
import sys

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lock import lock_run
from tests.storage.builders import new_run

HOLD = """
import sys, time
from pathlib import Path
from npo_cli.storage.lock import lock_run
from npo_cli.storage.layout import open_run
with lock_run(open_run(Path(sys.argv[1]))):
    sys.stdout.write("held")
    sys.stdout.flush()
    time.sleep(60)
"""


def holder_of(run: RunDir) -> subprocess.Popen[bytes]:
    """A live process that holds the lock."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(run.root)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.read(4) == b"held"
    return child


def test_a_live_writer_keeps_others_out_and_a_killed_one_does_not(tmp_path):
    run = new_run(tmp_path)
    child = holder_of(run)
    try:
        with pytest.raises(NpoError, match=f"in use by process {child.pid} on .* since 20") as caught, lock_run(run):
            pass
        assert caught.value.hint.endswith(f"kill {child.pid}")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert run.holder_path.exists()  # the dead one's note, which nobody believes
    with lock_run(run):
        assert str(os.getpid()) in run.holder_path.read_text()


def test_a_lock_without_a_note_still_holds(tmp_path):
    run = new_run(tmp_path)
    child = holder_of(run)
    try:
        run.holder_path.unlink()
        with pytest.raises(NpoError, match="in use by another npo process"), lock_run(run):
            pass
    finally:
        child.kill()
        child.wait()


def test_the_lock_goes_when_the_block_ends_or_fails(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(ZeroDivisionError), lock_run(run):
        _ = 1 / 0
    with lock_run(run):
        pass
    assert not run.holder_path.exists()


def test_the_same_process_cannot_write_twice(tmp_path):
    run = new_run(tmp_path)
    with lock_run(run), pytest.raises(NpoError, match=f"in use by process {os.getpid()}"), lock_run(run):
        pass
