"""What a process is doing within one record's work: rollouts that finish, passes of an update, loading, saving.

Engines and the trainer report; a display listens. Reports are for people: nothing that is computed depends on them, and
without a listener none is made.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

SECONDS_BETWEEN_REPORTS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """One report. Of several ranks, each reports its own part."""

    name: str
    done: int = 0
    total: int = 0
    """0 where it is not counted."""
    tokens: int | None = None
    """Generated so far, where tokens are generated."""
    seconds: float | None = None
    """How long it took; None while it runs."""


Listener = Callable[[Activity], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("activity_listener", default=None)
_SAMPLES: ContextVar[str] = ContextVar("activity_samples", default="rollouts")


def listen(listener: Listener | None) -> None:
    """Send the reports of this context, and of contexts copied from it later, to `listener`."""
    _LISTENER.set(listener)


def report_activity(activity: Activity) -> None:
    """Send a report to the listener, if there is one."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(activity)


@contextmanager
def report_seconds(name: str) -> Iterator[None]:
    """Report how long the block, or the decorated function, took."""
    report_activity(Activity(name=name))
    began = time.perf_counter()
    yield
    report_activity(Activity(name=name, seconds=time.perf_counter() - began))


@contextmanager
def name_samples(name: str) -> Iterator[None]:
    """What the engine's samples are called within the block, or in the decorated function; else `rollouts`."""
    token = _SAMPLES.set(name)
    try:
        yield
    finally:
        _SAMPLES.reset(token)


class SampleMeter:
    """Reports the finished samples of one call of an engine, a few times per second."""

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.total, self._clock = _SAMPLES.get(), total, clock
        self.done = self.tokens = 0
        """Of the batches that have ended."""
        self._last = clock()
        report_activity(Activity(name=self.name, total=total, tokens=0))

    @property
    def is_due(self) -> bool:
        """Whether the last report is old enough for the next one."""
        return self._clock() - self._last >= SECONDS_BETWEEN_REPORTS

    def report(self, done: int, tokens: int) -> None:
        """Samples and tokens of the batch that runs."""
        self._last = self._clock()
        report_activity(Activity(name=self.name, done=self.done + done, total=self.total, tokens=self.tokens + tokens))

    def add(self, done: int, tokens: int) -> None:
        """Samples that ended; the report is made when it is due, and at the last one."""
        self.done, self.tokens = self.done + done, self.tokens + tokens
        if self.is_due or self.done >= self.total:
            self.report(0, 0)


def open_meter(total: int) -> SampleMeter | None:
    """A meter for that many samples; None where nobody listens, so that nothing is counted."""
    return None if _LISTENER.get() is None else SampleMeter(total)
