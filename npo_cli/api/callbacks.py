"""Callbacks of training: they read records, and may ask it to stop; they cannot change what is computed."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

from npo_cli.distributed.process_group import current_group
from npo_cli.errors import CallbackError, StoppedEarly, first_line
from npo_cli.session.stop_signal import StopFlag
from npo_cli.types.rollouts import CheckpointSaved, EvalReport, StepReport

Record = TypeVar("Record")
HOOKS = {StepReport: "on_step", EvalReport: "on_eval", CheckpointSaved: "on_save"}


class Callback:
    """Base class of callbacks. Override the hooks that are needed; each gets the record that the command prints.

    The hooks are called between two steps, in rank 0 only. What they do to a record or to the global random numbers
    does not reach the training. An exception in a hook ends the training: the step is finished and saved, then
    `CallbackError` names the callback.
    """

    _stop_reason: str | None = None

    def on_step(self, record: StepReport) -> None:
        """After each training step; it is on record, but not saved yet."""

    def on_eval(self, record: EvalReport) -> None:
        """After each held-out evaluation of the training."""

    def on_save(self, record: CheckpointSaved) -> None:
        """After each checkpoint, that of step 0 included.

        Where it was written in the background (`train.save_in_background`), the step after it has been trained already,
        and a `stop` here ends the training after that one.
        """

    def stop(self, reason: str = "") -> None:
        """End the training after the current step, as a signal does: the step is saved, and `npo.resume` continues.

        `npo.train` then returns as usual; its result says which callback stopped it.
        """
        self._stop_reason = reason


class CallbackCalls:
    """Calls callbacks with the records that pass, and stops the training where one of them wants it."""

    def __init__(self, callbacks: Sequence[Callback], flag: StopFlag) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"{callback!r} is no npo.Callback: derive its class from npo.Callback")
            callback._stop_reason = None
        self.callbacks = list(callbacks) if current_group().is_main else []
        self.flag = flag
        self.failure: tuple[str, Exception] | None = None

    def pass_through(self, records: Iterator[Record]) -> Generator[Record, None, None]:
        """The same records. A stop that the program asked for is the end of them; a failed callback an error."""
        with closing(records):  # type: ignore[type-var]
            try:
                for record in records:
                    for callback in tuple(self.callbacks):
                        self.call(callback, record)
                    yield record
            except StoppedEarly:
                if self.failure is None and not self.flag.is_requested:
                    raise
        if self.failure is not None:
            where, error = self.failure
            raise CallbackError(
                f"callback {where} failed: {type(error).__name__}: {first_line(error)}; the training is saved",
                "correct the callback, then continue with npo.resume(run, callbacks=[...])",
            ) from error

    def call(self, callback: Callback, record: object) -> None:
        """Call the hook for a record; one that fails is called no more, and stops the training."""
        hook = HOOKS.get(type(record))
        if hook is None:
            return
        name = type(callback).__name__
        try:
            getattr(callback, hook)(copy_numbers(record))
        except Exception as error:
            self.callbacks.remove(callback)
            self.failure = self.failure or (f"{name}.{hook} at step {record.step}", error)  # type: ignore[attr-defined]
            self.flag.request(f"callback {name}")
        if callback._stop_reason is not None:
            reason = f" ({callback._stop_reason})" if callback._stop_reason else ""
            self.flag.request(f"callback {name}{reason}")


def copy_numbers(record: Record) -> Record:
    """A step with dicts of its own, which may be changed; the other records cannot be."""
    if isinstance(record, StepReport):
        return replace(record, metrics=dict(record.metrics), timings=dict(record.timings))
    return record
