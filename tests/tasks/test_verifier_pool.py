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
from tests.tasks.checks import build_death, build_double, build_failure, build_trouble


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


def test_values_come_back_in_the_order_of_the_items():
    pool = VerifierPool(build=build_double, num_workers=2, timeout=5)
    assert [outcome.value for outcome in pool.run(range(50))] == [2 * item for item in range(50)]
    pool.close()


def test_nothing_is_started_for_no_items(trouble: VerifierPool):
    assert trouble.run([]) == []
    assert trouble._workers == []


def test_a_loop_costs_its_own_item_only_and_about_the_timeout(trouble: VerifierPool):
    assert [outcome.value for outcome in trouble.run(["a", "b"])] == ["A", "B"]
    started = time.monotonic()
    outcomes = trouble.run(["a", "loop", "b", "c"])
    assert [outcome.value for outcome in outcomes] == ["A", None, "B", "C"]
    assert [outcome.timed_out for outcome in outcomes] == [False, True, False, False]
    assert 0.5 <= time.monotonic() - started < 3


@pytest.mark.parametrize("harm", ["loop in C", "exit", "segfault"])
def test_a_process_that_dies_or_cannot_be_interrupted_is_replaced(trouble: VerifierPool, harm: str):
    # one worker would be enough to show it: more items than workers, so the replacement has to answer
    outcomes = trouble.run([harm, harm, "a", "b"])
    assert [(outcome.value, outcome.timed_out) for outcome in outcomes] == [
        (None, True),
        (None, True),
        ("A", False),
        ("B", False),
    ]


def test_an_exception_is_told_with_its_place_and_the_process_lives_on(trouble: VerifierPool):
    raised, pid = trouble.run(["raise", "a"])
    assert raised.error is not None
    assert raised.error.endswith("ValueError: no such item")
    assert "checks.py:" in raised.error
    assert pid.value == "A"


def test_a_pool_works_from_a_thread_that_is_not_the_main_one(trouble: VerifierPool):
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(trouble.run(["loop", "a"])))
    thread.start()
    thread.join()
    assert [(outcome.value, outcome.timed_out) for outcome in found] == [(None, True), ("A", False)]


def test_close_leaves_no_process_and_the_pool_can_be_used_again(trouble: VerifierPool):
    pids = {outcome.value for outcome in trouble.run(["pid"] * 8)}
    assert len(pids) == 2
    trouble.close()
    assert wait_until_gone(sorted(pids), seconds=2)
    assert trouble.run(["a"])[0].value == "A"


def test_an_idle_process_that_was_killed_from_outside_loses_nothing(trouble: VerifierPool):
    for pid in {outcome.value for outcome in trouble.run(["pid"] * 8)}:
        os.kill(pid, signal.SIGKILL)
        wait_until_gone([pid], seconds=2)
    assert [outcome.value for outcome in trouble.run(["a", "b", "c"])] == ["A", "B", "C"]


def test_stop_signals_to_a_worker_are_not_its_business(trouble: VerifierPool):
    pids = {outcome.value for outcome in trouble.run(["pid"] * 8)}
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert {outcome.value for outcome in trouble.run(["pid"] * 8)} == pids


def test_a_child_of_a_late_check_ends_with_it(trouble: VerifierPool):
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


def test_what_a_check_prints_stays_out_of_stdout(capfd: pytest.CaptureFixture[str]):
    pool = VerifierPool(build=build_trouble, num_workers=1, timeout=5)
    assert pool.run(["print"])[0].value == "PRINT"
    pool.close()
    assert capfd.readouterr().out == ""


def test_a_check_that_cannot_be_built_is_told_once_and_at_once():
    pool = VerifierPool(build=build_failure, num_workers=2, timeout=5)
    with pytest.raises(RunFailed, match=r"checks\.py:\d+: ImportError: nothing to import"):
        pool.run(["a"])
    assert pool._workers == []


def test_a_process_that_dies_while_it_starts_is_told():
    pool = VerifierPool(build=build_death, num_workers=1, timeout=5)
    with pytest.raises(RunFailed, match="died while it started"):
        pool.run(["a"])


ORPHANS = """
import threading, time
from npo_cli.tasks.verifier_pool import VerifierPool
from tests.tasks.checks import build_trouble
pool = VerifierPool(build=build_trouble, num_workers=2, timeout=1.0)
print(*sorted({outcome.value for outcome in pool.run(["pid"] * 8)}), flush=True)
threading.Thread(target=pool.run, args=(["loop"],), daemon=True).start()
time.sleep(60)
"""


def test_no_process_outlives_a_parent_that_was_killed():
    # one worker idles at its pipe, the other is in an endless loop: the first sees the pipe close, the second
    # ends itself one second of grace after its deadline of one second
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, cwd=root)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.3)
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pids, seconds=5)


def test_a_program_that_forgets_to_close_still_ends():
    script = ORPHANS.partition("threading.Thread")[0]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=20)
    assert done.returncode == 0
    assert wait_until_gone([int(pid) for pid in done.stdout.split()], seconds=2)
