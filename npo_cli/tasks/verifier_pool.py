"""A pool of processes for checks that may hang or crash, with a timeout that works for any code.

A signal-based timeout works only in the main thread and never inside a C call. Here a check runs in its own process.
No process starts before the first item. `serve_checks` is the worker process: it checks items from its pipe until the
pipe closes. What happens to a process that does not answer:

- late: the item is `timed_out`, and a new process checks the next ones;
- dead while it checks an item (`os._exit`, segfault, KeyboardInterrupt, closed pipe): the item has an `error` with the
  exit code and the process's last output, as if the check had raised it;
- dead between two items: a new process, nothing is lost;
- dead before its first item: so would be the next one. The run ends (`RunFailed`) with the process's last output.

When the parent dies, however it dies, the kernel kills the workers and what they started (on Linux).
"""

import atexit
import fcntl
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, BinaryIO, NoReturn

from npo_cli.errors import NpoError, RunFailed

GRACE_SECONDS = 1.0
"""Seconds after the timeout at which a worker ends itself, where the kernel does not kill it with its parent."""


def serve_checks(
    channel: Connection,
    lifeline: Connection,
    output: Connection,
    build: Callable[[], Callable[[Any], Any]],
    timeout: float,
) -> None:
    """Build the check, report it, then answer every item with ("value", v) or ("error", text).

    The other end of `lifeline` closes when the parent dies. What is printed goes to the file behind `output`, in which
    the parent finds why a process died, and after each item from there to stderr.
    """
    _leave_process_group()
    _die_at_hangup(lifeline)
    with _collect_output(output) as forward_output:
        try:
            check = build()
        except NpoError as error:
            channel.send(("refused", (error.message, error.hint)))
            return
        except Exception as error:
            channel.send(("broken", describe_error(error)))
            return
        channel.send(("ready", None))
        while True:
            try:
                item = channel.recv()
            except (EOFError, ConnectionError):
                return  # the parent is gone
            # The default action of SIGALRM ends the process, even in a loop inside C code.
            signal.setitimer(signal.ITIMER_REAL, timeout + GRACE_SECONDS)
            try:
                reply = ("value", check(item))
            except Exception as error:
                reply = ("error", describe_error(error))
            signal.setitimer(signal.ITIMER_REAL, 0)
            forward_output()
            try:
                channel.send(reply)
            except ConnectionError:
                return


def describe_error(error: BaseException, *, inside: str | None = None) -> str:
    """`file:line: Type: message` of an error, at its innermost frame, or its innermost frame in the file `inside`."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {text}" if error.filename else f"{inside}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename == inside] or frames
    return f"{ours[-1].filename}:{ours[-1].lineno}: {text}" if ours else text


@contextmanager
def _collect_output(output: Connection) -> Iterator[Callable[[], None]]:
    """Write stdout and stderr to the file; the function that is yielded moves what is in it to stderr."""
    file, terminal = output.fileno(), os.dup(2)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # its last line is not lost with the process

    def forward() -> None:
        sys.stdout.flush()
        size = os.fstat(file).st_size
        if size:
            _write_all(terminal, os.pread(file, size, 0))
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)

    yield forward
    forward()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _die_at_hangup(lifeline: Connection) -> None:
    """Have the kernel kill this process group when the other end closes, even while C code runs."""
    if not hasattr(fcntl, "F_SETSIG"):
        return
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # it closed before
        os._exit(1)


def _leave_process_group() -> None:
    """Leave the terminal's process group, so that only the parent stops this process.

    Signal handlers do nothing instead of SIG_IGN, which child programs of a check would inherit.
    """
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


LAST_OUTPUT_LINES = 8
START_TIMEOUT_SECONDS = 60.0
"""Timeout for the imports of a new process."""

Check = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """The result for one item: a value, or the text of an exception or of the process's death, or `timed_out`."""

    value: Any = None
    error: str | None = None
    timed_out: bool = False


@dataclass(kw_only=True, slots=True, eq=False)
class _Worker:
    process: BaseProcess
    channel: Connection
    deadline: float
    """When its next report is due (monotonic seconds)."""
    lifeline: Connection
    """Closing it kills the process."""
    output: BinaryIO
    """What it printed and did not forward to stderr yet."""
    ready: bool = False
    has_worked: bool = False
    """It was given an item."""
    item: int | None = None
    """Index of its current item."""

    def describe_death(self) -> str:
        """Its exit code, or the signal that killed it, and its last output."""
        self.process.join(1.0)  # its pipe closes shortly before it ends
        lines = self.read_output().decode(errors="replace").strip().splitlines()[-LAST_OUTPUT_LINES:]
        code = self.process.exitcode
        end = "it runs on" if code is None else f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"{end}; " + ("last output:\n" + "\n".join(lines) if lines else "no output")

    def read_output(self) -> bytes:
        """What it printed and did not forward."""
        self.output.seek(0)
        return self.output.read()

    def kill(self) -> None:
        """Kill its process group, with the processes that it started."""
        with suppress(ProcessLookupError):  # before `setsid`
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.process.close()
        for file in (self.channel, self.lifeline, self.output):
            file.close()


@dataclass(kw_only=True, slots=True, eq=False)
class VerifierPool:
    """Runs `build()`'s check on items in several processes, each item within `timeout` seconds."""

    build: Callable[[], Check]
    """Called once per process (so it must be picklable); its imports do not count toward the timeout of an item."""
    num_workers: int
    timeout: float
    _workers: list[_Worker] = field(init=False, default_factory=list)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def start(self) -> None:
        """Start one process, so that a check that cannot be built fails before there is anything to check."""
        with self._lock:
            self._fill(1)
            while not all(worker.ready for worker in self._workers):
                self._collect()

    def run(self, items: Sequence[Any]) -> list[CheckResult]:
        """The result for each item, in order. Thread-safe: one batch at a time."""
        with self._lock:
            try:
                return self._run(items)
            finally:
                # After an error or Ctrl-C, a late reply must not be read as a reply to the next batch.
                for worker in [worker for worker in self._workers if worker.item is not None or not worker.ready]:
                    self._drop(worker)

    def close(self) -> None:
        """Kill all processes. The pool stays usable and then starts new ones."""
        with self._lock:
            for worker in list(self._workers):
                self._drop(worker)
            atexit.unregister(self.close)

    def _run(self, items: Sequence[Any]) -> list[CheckResult]:
        results: dict[int, CheckResult] = {}
        waiting = deque(range(len(items)))
        while len(results) < len(items):
            self._fill(len(items) - len(results))
            for worker in list(self._workers):
                if waiting and worker.ready and worker.item is None:
                    self._hand_out(worker, waiting, items)
            results.update(self._collect())
        return [results[index] for index in range(len(items))]

    def _fill(self, num_open: int) -> None:
        """Start processes up to `num_workers`, but no more than there are open items."""
        while len(self._workers) < min(self.num_workers, num_open):
            context = get_context("spawn")
            ours, theirs = context.Pipe()
            their_lifeline, lifeline = context.Pipe(duplex=False)
            output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker
            their_output = Connection(os.dup(output.fileno()))  # which a new process can inherit
            arguments = (theirs, their_lifeline, their_output, self.build, self.timeout)
            process = context.Process(target=serve_checks, args=arguments, daemon=True)
            if not self._workers:
                # This exit hook must run before multiprocessing's, which would wait for the processes.
                atexit.unregister(self.close)
                atexit.register(self.close)
            process.start()
            for file in (theirs, their_lifeline, their_output):
                file.close()
            deadline = time.monotonic() + START_TIMEOUT_SECONDS
            self._workers.append(
                _Worker(process=process, channel=ours, deadline=deadline, lifeline=lifeline, output=output)
            )

    def _hand_out(self, worker: _Worker, waiting: deque[int], items: Sequence[Any]) -> None:
        try:
            worker.channel.send(items[waiting[0]])
        except ConnectionError:
            if not worker.has_worked:
                self._fail(worker, "died before its first call")
            self._drop(worker)  # it died while idle; the item waits for the next process
            return
        worker.item, worker.has_worked = waiting.popleft(), True
        worker.deadline = time.monotonic() + self.timeout

    def _collect(self) -> dict[int, CheckResult]:
        """Wait for the next report or deadline, and turn both into results."""
        pending = [worker for worker in self._workers if worker.item is not None or not worker.ready]
        first_deadline = min((worker.deadline for worker in pending), default=0.0)
        patience = max(0.0, first_deadline - time.monotonic())
        reported = set(wait([worker.channel for worker in pending], timeout=patience))
        now, results = time.monotonic(), {}
        for worker in pending:
            index = worker.item
            if worker.channel in reported:
                result = self._receive(worker)
            elif now >= worker.deadline:
                result = self._stop_late(worker)
            else:
                continue
            if result is not None and index is not None:
                results[index] = result
        return results

    def _receive(self, worker: _Worker) -> CheckResult | None:
        try:
            kind, payload = worker.channel.recv()
        except Exception:  # a closed pipe, or a reply that the check itself wrote into it
            return self._describe_dead(worker)
        if kind == "refused":
            raise NpoError(*payload)
        if kind == "broken":
            raise RunFailed(f"the verifier could not be started: {payload}", "fix it, then run the command again")
        worker.ready, worker.item = True, None
        if kind == "error":
            return CheckResult(error=payload)
        return CheckResult(value=payload) if kind == "value" else None

    def _stop_late(self, worker: _Worker) -> CheckResult:
        """Drop a process that is late; its current item counts as timed out. Without one the run ends."""
        if worker.item is None:
            self._fail(worker, f"did not start within {START_TIMEOUT_SECONDS:.0f} s")
        _write_all(2, worker.read_output())
        self._drop(worker)
        return CheckResult(timed_out=True)

    def _describe_dead(self, worker: _Worker) -> CheckResult:
        """Drop a process that died; its current item has an error. Without one the run ends."""
        if worker.item is None:
            self._fail(worker, "died while it started")
        death = worker.describe_death()
        if worker.process.exitcode == -signal.SIGALRM:  # its own alarm came before this process could look
            return self._stop_late(worker)
        self._drop(worker)
        return CheckResult(error=f"its process died ({death})")

    def _fail(self, worker: _Worker, why: str) -> NoReturn:
        details = worker.describe_death()
        self._drop(worker)
        raise RunFailed(
            f"a verifier process {why} ({details})",
            "fix what it reports and run the command again; without output, a common cause is that memory is full",
        )

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
