"""Checks that may hang or crash, in processes that can be killed: a deadline here is kept whatever the code does.

A signal-based timeout works in the main thread only and never inside a C call; verifiers with one have given
reward 0 in threads, or hung for good. Here a check gets a process, and a late or dead process is replaced. Only
the item it was at is lost. Nothing is started before the first item.

The far end of a `VerifierPool`: one process that checks what comes down its pipe until the pipe closes.
"""

import atexit
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from npo_cli.errors import NpoError, RunFailed

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


START_TIMEOUT_SECONDS = 60.0
"""Time a new process has to import what it needs."""

Check = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """What became of one item: a value, an error text where the check raised, or neither: late, or its process died."""

    value: Any = None
    error: str | None = None
    timed_out: bool = False


@dataclass(kw_only=True, slots=True, eq=False)
class _Worker:
    process: BaseProcess
    channel: Connection
    deadline: float
    """Monotonic seconds by which it must have reported."""
    ready: bool = False
    item: int | None = None
    """Place of the item it is at."""

    def kill(self) -> None:
        """End it now, with the processes it may have started: it leads a group of its own."""
        with suppress(ProcessLookupError):  # not yet at the head of its group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.process.close()
        self.channel.close()


@dataclass(kw_only=True, slots=True, eq=False)
class VerifierPool:
    """Runs `build()`'s check on items in several processes, each item within `timeout` seconds."""

    build: Callable[[], Check]
    """Called once in each process (so it must be picklable): imports and warms up outside any item's time."""
    num_workers: int
    timeout: float
    _workers: list[_Worker] = field(init=False, default_factory=list)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def start(self) -> None:
        """Bring one process up, so that a check that cannot be built is known before there is anything to check."""
        with self._lock:
            self._fill(1)
            while not all(worker.ready for worker in self._workers):
                self._collect()

    def run(self, items: Sequence[Any]) -> list[CheckResult]:
        """The outcome of each item, in their order; safe from any thread, one batch at a time."""
        with self._lock:
            try:
                return self._run(items)
            finally:
                # After an error or Ctrl-C, a late reply must not be taken for the next batch's.
                for worker in [worker for worker in self._workers if worker.item is not None or not worker.ready]:
                    self._drop(worker)

    def close(self) -> None:
        """Kill every process. The pool can be used again: it then starts new ones."""
        with self._lock:
            for worker in list(self._workers):
                self._drop(worker)
            atexit.unregister(self.close)

    def _run(self, items: Sequence[Any]) -> list[CheckResult]:
        outcomes: dict[int, CheckResult] = {}
        waiting = deque(range(len(items)))
        while len(outcomes) < len(items):
            self._fill(len(items) - len(outcomes))
            for worker in list(self._workers):
                if waiting and worker.ready and worker.item is None:
                    self._hand_out(worker, waiting, items)
            outcomes.update(self._collect())
        return [outcomes[place] for place in range(len(items))]

    def _fill(self, num_open: int) -> None:
        """Bring the pool to strength, with no more processes than there is work for."""
        while len(self._workers) < min(self.num_workers, num_open):
            context = get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_checks, args=(theirs, self.build, self.timeout), daemon=True)
            if not self._workers:
                # Our exit hook runs before multiprocessing's, which would wait for them.
                atexit.unregister(self.close)
                atexit.register(self.close)
            process.start()
            theirs.close()
            self._workers.append(
                _Worker(process=process, channel=ours, deadline=time.monotonic() + START_TIMEOUT_SECONDS)
            )

    def _hand_out(self, worker: _Worker, waiting: deque[int], items: Sequence[Any]) -> None:
        try:
            worker.channel.send(items[waiting[0]])
        except BrokenPipeError:
            self._drop(worker)  # it died idle; the item is untouched and waits for the next one
            return
        worker.item = waiting.popleft()
        worker.deadline = time.monotonic() + self.timeout

    def _collect(self) -> dict[int, CheckResult]:
        """Wait for a report or a deadline, and make both into outcomes."""
        pending = [worker for worker in self._workers if worker.item is not None or not worker.ready]
        first_deadline = min((worker.deadline for worker in pending), default=0.0)
        patience = max(0.0, first_deadline - time.monotonic())
        reported = set(wait([worker.channel for worker in pending], timeout=patience))
        now, outcomes = time.monotonic(), {}
        for worker in pending:
            place = worker.item
            if worker.channel in reported:
                outcome = self._receive(worker)
            elif now >= worker.deadline:
                outcome = self._lose(worker, f"did not start within {START_TIMEOUT_SECONDS:.0f} s")
            else:
                continue
            if outcome is not None and place is not None:
                outcomes[place] = outcome
        return outcomes

    def _receive(self, worker: _Worker) -> CheckResult | None:
        try:
            kind, payload = worker.channel.recv()
        except (EOFError, OSError):
            return self._lose(worker, "died while it started")
        if kind == "broken":
            raise RunFailed(f"the verifier could not be started: {payload}", "mend it, then run the command again")
        worker.ready, worker.item = True, None
        if kind == "error":
            return CheckResult(error=payload)
        return CheckResult(value=payload) if kind == "value" else None

    def _lose(self, worker: _Worker, why: str) -> CheckResult:
        """A process that died or is late costs the item it was at, and nothing else."""
        self._drop(worker)
        if worker.item is None:
            raise RunFailed(f"a verifier process {why}", "run the command again; a full memory is a common cause")
        return CheckResult(timed_out=True)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
