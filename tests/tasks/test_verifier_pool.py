import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from npo_cli.errors import RunFailed
from npo_cli.tasks.verifier_pool import VerifierPool
from tests.tasks.checks import (
    build_death,
    build_double,
    build_failure,
    build_greeting,
    build_interrupt,
    build_short_life,
    build_trouble,
)


@pytest.fixture
def trouble() -> Iterator[VerifierPool]:
    pool = VerifierPool(build=build_trouble, num_workers=2, timeout=0.5)
    yield pool
    pool.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended but was not yet fetched does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_verifier_pool_keeps_the_order():
    pool = VerifierPool(build=build_double, num_workers=2, timeout=5)
    assert [outcome.value for outcome in pool.run(range(50))] == [2 * item for item in range(50)]
    pool.close()


def test_verifier_pool_starts_no_process_without_items(trouble: VerifierPool):
    assert trouble.run([]) == []
    assert trouble._workers == []


def test_verifier_pool_times_out_one_item_only(trouble: VerifierPool):
    assert [outcome.value for outcome in trouble.run(["a", "b"])] == ["A", "B"]
    started = time.monotonic()
    outcomes = trouble.run(["a", "loop", "b", "c"])
    assert [outcome.value for outcome in outcomes] == ["A", None, "B", "C"]
    assert [outcome.timed_out for outcome in outcomes] == [False, True, False, False]
    assert time.monotonic() - started >= 0.5


def test_verifier_pool_times_out_a_loop_in_c_and_replaces_its_process(trouble: VerifierPool):
    # one worker would be enough to show it: more items than workers, so the replacement has to answer
    outcomes = trouble.run(["loop in C", "loop in C", "a", "b"])
    assert [(outcome.value, outcome.timed_out) for outcome in outcomes] == [
        (None, True),
        (None, True),
        ("A", False),
        ("B", False),
    ]


@pytest.mark.parametrize(
    ("harm", "death"),
    [
        ("exit", "exit code 3; last output:\ntime to go"),
        ("segfault", "SIGSEGV; no output"),
        ("interrupt", "exit code 1; last output:\nTraceback"),
        ("close", "exit code 1; last output:\nTraceback"),
        ("garbage", "; no output"),
    ],
)
def test_verifier_pool_tells_a_dead_process_from_a_late_one(trouble: VerifierPool, harm: str, death: str):
    died, late, *whole = trouble.run([harm, "loop", "a", "b"])
    assert died.error.startswith("its process died (")
    assert death.partition("Traceback")[0] in died.error
    assert not died.timed_out
    assert (late.error, late.timed_out) == (None, True)
    assert [outcome.value for outcome in whole] == ["A", "B"]


def test_verifier_pool_process_that_ends_itself_is_late(trouble: VerifierPool):
    # where this process is slow, the alarm of the worker comes first
    result, after = trouble.run(["alarm", "a"])
    assert (result.timed_out, result.error, after.value) == (True, None, "A")


def test_verifier_pool_exception_names_the_line(trouble: VerifierPool):
    raised, pid = trouble.run(["raise", "a"])
    assert raised.error is not None
    assert raised.error.endswith("ValueError: no such item")
    assert "checks.py:" in raised.error
    assert pid.value == "A"


def test_verifier_pool_works_in_a_thread(trouble: VerifierPool):
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(trouble.run(["loop", "a"])))
    thread.start()
    thread.join()
    assert [(outcome.value, outcome.timed_out) for outcome in found] == [(None, True), ("A", False)]


def test_verifier_pool_can_be_used_after_close(trouble: VerifierPool):
    pids = {outcome.value for outcome in trouble.run(["pid"] * 8)}
    assert len(pids) == 2
    trouble.close()
    assert wait_until_gone(sorted(pids), seconds=2)
    assert trouble.run(["a"])[0].value == "A"


def test_verifier_pool_survives_a_killed_idle_process(trouble: VerifierPool):
    for pid in {outcome.value for outcome in trouble.run(["pid"] * 8)}:
        os.kill(pid, signal.SIGKILL)
        wait_until_gone([pid], seconds=2)
    assert [outcome.value for outcome in trouble.run(["a", "b", "c"])] == ["A", "B", "C"]


def test_verifier_pool_workers_ignore_stop_signals(trouble: VerifierPool):
    pids = {outcome.value for outcome in trouble.run(["pid"] * 8)}
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert {outcome.value for outcome in trouble.run(["pid"] * 8)} == pids


def test_verifier_pool_kills_children_of_a_late_check(trouble: VerifierPool):
    assert trouble.run(["sleeping child"])[0].timed_out
    assert wait_until_gone(sleepers(), seconds=2)


def sleepers() -> list[int]:
    """The processes that the check `sleeping child` starts."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"__import__('time').sleep(60)" in command.read_bytes().split(b"\0"):
                found.append(int(command.parent.name))
    return found


def test_verifier_pool_output_goes_to_stderr(capfd: pytest.CaptureFixture[str]):
    pool = VerifierPool(build=build_trouble, num_workers=1, timeout=0.5)
    assert [outcome.value for outcome in pool.run(["print", "print", "print and loop"])] == ["PRINT", "PRINT", None]
    pool.close()
    assert tuple(capfd.readouterr()) == ("", "noise\nnoise\nlate noise\n")


def test_verifier_pool_build_error_is_reported():
    pool = VerifierPool(build=build_failure, num_workers=2, timeout=5)
    with pytest.raises(RunFailed, match=r"checks\.py:\d+: ImportError: nothing to import"):
        pool.run(["a"])
    assert pool._workers == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (build_death, r"died while it started \(exit code 9; last output:\nno license found\)"),
        (build_interrupt, r"died while it started \(exit code 1; last output:\n[\s\S]*\nKeyboardInterrupt\)"),
    ],
)
def test_verifier_pool_process_that_dies_at_start_ends_the_run_with_its_last_output(build, message):
    pool = VerifierPool(build=build, num_workers=2, timeout=5)
    with pytest.raises(RunFailed, match=message):
        pool.run(["a", "b"])
    assert pool._workers == []


def test_verifier_pool_process_that_dies_before_its_first_call_ends_the_run_with_its_last_output():
    pool = VerifierPool(build=build_short_life, num_workers=1, timeout=5)
    pool.start()
    wait_until_gone([pool._workers[0].process.pid], seconds=5)
    with pytest.raises(
        RunFailed, match=r"died before its first call \(exit code 7; last output:\nwatchdog: time is up"
    ):
        pool.run(["a"])
    assert pool._workers == []


def test_verifier_pool_copies_what_is_printed_before_the_first_call_to_stderr(capfd: pytest.CaptureFixture[str]):
    pool = VerifierPool(build=build_greeting, num_workers=1, timeout=5)
    assert pool.run(["a"])[0].value == "A"
    pool.close()
    assert tuple(capfd.readouterr()) == ("", "hello\n")


ORPHANS = """
import threading, time
from npo_cli.tasks.verifier_pool import VerifierPool
from tests.tasks.checks import build_trouble
pool = VerifierPool(build=build_trouble, num_workers=3, timeout=600.0)
print(*sorted({outcome.value for outcome in pool.run(["pid"] * 60)}), flush=True)
threading.Thread(target=pool.run, args=(["loop in C", "sleeping child"],), daemon=True).start()
time.sleep(60)
"""


def test_verifier_pool_processes_end_with_a_killed_parent():
    """One worker is idle, one in an endless loop in C that holds the GIL, one waits for a process that it started."""
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, cwd=root)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    deadline = time.monotonic() + 30
    while not sleepers():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(pids) == 3
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone([*pids, *sleepers()], seconds=5)


def test_verifier_pool_ends_without_close():
    script = ORPHANS.partition("threading.Thread")[0]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=20)
    assert done.returncode == 0
    assert wait_until_gone([int(pid) for pid in done.stdout.split()], seconds=2)
