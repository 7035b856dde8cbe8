"""A stage of the workflow as a function: called, it runs to its end; `.stream` yields its records one by one.

`npo.train(recipe, "runs/a")` trains and returns a result. `for record in npo.train.stream(recipe, "runs/a")` trains as
the loop runs, and yields what the command prints. A stage never prints: notices of a call are logged to the logger
`npo_cli`.
"""

import contextlib
import inspect
import logging
import random
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import Context, copy_context
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from npo_cli.activity import Listener, listen
from npo_cli.api.callbacks import Callback, CallbackCalls, copy_numbers
from npo_cli.errors import NpoError
from npo_cli.session.startup import ignore_deprecations
from npo_cli.session.stop_signal import StopFlag
from npo_cli.types.rollouts import Notice, Progress

if TYPE_CHECKING:
    from npo_cli.types.views import PlannedWork

LOGGER = logging.getLogger("npo_cli")
P = ParamSpec("P")
Record = TypeVar("Record")
Result = TypeVar("Result")


class RecordStream(Generator[Record, None, None], Generic[Record]):
    """The records of one stage, which works while they are read.

    Arguments are checked when the stream is made. Nothing else happens before the first record is read: a stream that
    is never read is reported as a RuntimeWarning. Leaving the loop early closes it: training is then as after a kill,
    at its last checkpoint; `stop` ends it saved. The program's own random numbers (random, numpy, torch) are not
    touched, nor do they change what is computed.
    """

    def __init__(
        self,
        records: Iterator[Record],
        *,
        name: str,
        root: Path = Path(),
        branch: str | None = None,
        callbacks: Sequence[Callback] = (),
        stop: StopFlag | None = None,
        last_step: int | None = None,
        allow_code: bool = False,
        plan: Callable[[], Iterator["PlannedWork | Notice"]] | None = None,
    ) -> None:
        self.root = root
        """The run directory."""
        self.branch = branch
        """The branch that is trained, where its name is known before."""
        self.last_step = last_step
        """Last step of this training, where it is known."""
        self._name, self._stop = name, StopFlag() if stop is None else stop
        self._plan, self._allow_code = plan, allow_code
        calls = CallbackCalls(callbacks, self._stop)
        ignore_deprecations()
        from npo_cli.storage.text_log import forget_waiting_lines

        forget_waiting_lines()
        self._context = copy_context()
        if allow_code:
            from npo_cli.tasks.custom_verifier import permit_code

            self._context.run(permit_code)
        self._records: Generator[Record, None, None] = calls.pass_through(_isolate(records, self._context))
        self._is_read = False

    def __next__(self) -> Record:
        self._is_read = True
        record = next(self._records)
        if isinstance(record, Notice):
            from npo_cli.storage.text_log import log_message

            log_message(record.message, level=record.level)
        return record

    def send(self, value: None) -> Record:
        """The next record; a value has no meaning."""
        return next(self)

    def throw(self, *error: Any) -> Record:
        """Raise an error where the stream stands, which ends it."""
        return self._records.throw(*error)

    def close(self) -> None:
        """End it where it stands. Training continues from its last checkpoint with `npo.resume`."""
        self._is_read = True
        self._records.close()

    def plan(self) -> "RecordStream[PlannedWork | Notice]":
        """In place of the work: what it would do and cost, after the same checks; writes nothing (`--dry-run`)."""
        if self._plan is None:
            raise NpoError(f"npo.{self._name} has no dry run", "iterate the stream, or call close()")
        self.close()
        return RecordStream(self._plan(), name=self._name, root=self.root, allow_code=self._allow_code)

    def stop(self, reason: str = "the program") -> None:
        """End training after the current step, saved: read on until the stream ends."""
        self._stop.request(reason)

    def listen(self, listener: Listener | None) -> None:
        """Call `listener` with an `Activity` a few times per second while a step samples, updates, loads or saves."""
        self._context.run(listen, listener)

    @property
    def stopped_by(self) -> str | None:
        """What the program gave as a reason to stop; None if it did not ask."""
        return self._stop.reason if self._stop.is_requested else None

    def __repr__(self) -> str:
        return f"<records of npo.{self._name}: iterate to run it, or call npo.{self._name}(...)>"

    def __del__(self) -> None:
        if not getattr(self, "_is_read", True):
            warnings.warn(
                f"npo.{self._name}.stream(...) was never iterated: nothing was done", RuntimeWarning, stacklevel=2
            )


class Stage(Generic[P, Record, Result]):
    """A stage of the workflow. Calling it runs it and returns its result; `stream` yields its records."""

    def __init__(
        self, function: Callable[P, RecordStream[Record]], collect: Callable[[RecordStream[Record]], Result]
    ) -> None:
        self._function, self._collect = function, collect
        update_wrapper(self, function)
        returned = inspect.signature(collect).return_annotation
        self.__signature__ = inspect.signature(function).replace(return_annotation=returned)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        """Run the stage to its end."""
        with contextlib.closing(self._function(*args, **kwargs)) as stream:
            return self._collect(stream)

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> RecordStream[Record]:
        """Check the arguments, and yield the records while the stage runs; the same arguments as the call."""
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<npo.{self.__name__}: call it to run, or iterate npo.{self.__name__}.stream(...)>"  # type: ignore[attr-defined]


def returns(
    collect: Callable[[RecordStream[Record]], Result],
) -> Callable[[Callable[P, RecordStream[Record]]], Stage[P, Record, Result]]:
    """Decorator: a function that makes a stream becomes a stage, whose call returns `collect(stream)`."""
    return lambda function: Stage(function, collect)


def collect_records(stream: RecordStream[Record]) -> tuple[Record, ...]:
    """Run a stream to its end: its records without progress. Notices are logged as well."""
    records = []
    for record in stream:
        if isinstance(record, Notice):
            LOGGER.log(logging.WARNING if record.level == "warning" else logging.INFO, record.message)
        if not isinstance(record, Progress):
            records.append(record)
    return tuple(records)


def _isolate(records: Any, context: Context) -> Iterator[Record]:
    """The records, computed in their own context and with their own global random streams.

    What is done with a record cannot change what is computed after it: a step's numbers are a copy.
    """
    streams = _RandomStreams()

    def advance() -> Record:
        with streams.active():
            return next(records)

    try:
        while True:
            try:
                record = context.run(advance)
            except StopIteration:
                return
            yield copy_numbers(record)
    finally:
        context.run(records.close)


class _RandomStreams:
    """The global random streams of a stage, exchanged for the program's while the stage works."""

    def __init__(self) -> None:
        self._own: dict[str, Any] | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The stage's streams within the block, the program's after it."""
        before = _read_streams()
        if self._own is not None:
            _set_streams(self._own)
        try:
            yield
        finally:
            self._own = _read_streams()
            _set_streams(before)


def _read_streams() -> dict[str, Any]:
    """State of every global random stream whose library is loaded."""
    state: dict[str, Any] = {"random": random.getstate()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        state["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_streams(state: dict[str, Any]) -> None:
    random.setstate(state["random"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "torch" in state:
        sys.modules["torch"].set_rng_state(state["torch"])
    if "cuda" in state:
        sys.modules["torch"].cuda.set_rng_state_all(state["cuda"])
