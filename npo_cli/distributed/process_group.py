"""The ranks of one job: every rank runs the same command, rank 0 writes files and prints.

Started by a launcher such as torchrun, the ranks share torch.distributed's collectives. A single process has the same
interface, and every operation is local. Torch is imported only where several ranks meet.

Every collective belongs to a named phase and runs under a deadline. A rank that fails, or that loses contact with
another one, says so in the launcher's store; a rank that says nothing has died or hangs.
"""

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from npo_cli.distributed.launch import LaunchInfo
from npo_cli.errors import NpoError, RunFailed, StoppedEarly, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

FIRST_DEADLINE = 1800.0
"""Seconds; holds until the recipe's distributed.timeout is known."""
REPORT_SECONDS = 3.0
"""Time for a rank to say that it lost contact, and for rank 0 to report a failure."""
RESUME_HINT = "npo resume RUN continues from the last checkpoint"


class ProcessGroup:
    """One process: rank 0 of 1."""

    rank = 0
    world_size = 1
    is_launched = False
    """Whether a launcher's job was joined; models are then sharded, in a job of one rank too."""
    context = ""
    """Added to the phase in errors, such as `step 7`."""
    torch_group: Any = None
    """The torch process group of all ranks; None is torch's default group."""
    reports_errors = True
    """Whether this rank prints the error that ends it."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def configure(self, *, deadline: float, device: str) -> None:
        """Apply the recipe's deadline (seconds), and the backend of the device `cpu` or `cuda`."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Work in which the ranks wait for each other, named in errors."""
        yield

    def split(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's contiguous part; the parts differ by at most one item."""
        edges = [len(items) * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        return items[edges[0] : edges[1]]

    def gather(self, value: Item, *, phase: str) -> list[Item]:
        """Every rank's value, by rank."""
        return [value]

    def broadcast(self, value: Item, *, phase: str) -> Item:
        """Rank 0's value."""
        return value

    def run_on_main(self, function: Callable[[], Result], *, phase: str) -> Result:
        """Rank 0 runs it once all ranks are here; all get its result, or raise its error."""
        return function()

    def map(self, function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], *, phase: str) -> list:
        """`function` of this rank's part of the items; the results of all parts in order. An error is raised by all."""
        return list(function(items))

    @contextmanager
    def main_section(self) -> Iterator[None]:
        """Work of rank 0 alone: what this thread calls in the block is local, and no other rank takes part."""
        yield

    def finish(self) -> None:
        """The last call of a command, after an error was printed."""


class LaunchedGroup(ProcessGroup):
    """One of the ranks that a launcher started."""

    is_launched = True

    def __init__(self, launch: LaunchInfo) -> None:
        import torch.distributed as dist

        self.rank, self.world_size = launch.rank, launch.world_size
        self.reports_errors = self.is_main
        self.deadline, self._device = FIRST_DEADLINE, ""
        self._phase, self._failed_phase = "start", ""
        self._thread = threading.local()
        self._store = next(dist.rendezvous("env://"))[0]
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("npo/group", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=FIRST_DEADLINE),
        )

    def configure(self, *, deadline: float, device: str) -> None:
        """A group with this deadline, for all collectives from here on."""
        if (deadline, device) == (self.deadline, self._device):
            return
        import torch.distributed as dist

        with self.phase("connect"):
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            self.torch_group = dist.new_group(timeout=timedelta(seconds=deadline), backend=backend)
        self.deadline, self._device = deadline, device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A lost connection is turned into the error that names rank and phase."""
        outer, self._phase = self._phase, name
        label, began = self._label, time.monotonic()
        try:
            yield
        except Exception as error:
            self._failed_phase = self._failed_phase or label
            if not is_connection_lost(error):
                raise
            self._announce("")
            raise self._describe_loss(label, time.monotonic() - began, error) from error
        finally:
            self._phase = outer

    def gather(self, value: Item, *, phase: str) -> list[Item]:
        """By all_gather_object."""
        import torch.distributed as dist

        assert not self._is_main_section, "rank 0 alone cannot gather"
        values: list[Any] = [None] * self.world_size
        with self.phase(phase):
            dist.all_gather_object(values, value, group=self.torch_group)
        values[self.rank] = value
        return values

    def broadcast(self, value: Item, *, phase: str) -> Item:
        """By broadcast_object_list."""
        if self._is_main_section:
            return value
        import torch.distributed as dist

        box = [value]
        with self.phase(phase):
            dist.broadcast_object_list(box, src=0, group=self.torch_group)
        return value if self.is_main else box[0]

    def run_on_main(self, function: Callable[[], Result], *, phase: str) -> Result:
        """A barrier before it: what the others read before the call is not yet changed."""
        if self._is_main_section:
            return function()
        import torch.distributed as dist

        with self.phase(phase):
            dist.barrier(group=self.torch_group)
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                with self.main_section():
                    outcome = (function(), None)
            except Exception as error:
                outcome = (None, error)
        result, error = outcome
        sent = self.broadcast((result, None if error is None else self._portable(error)), phase=phase)
        result, error = outcome if self.is_main else sent
        if error is not None:
            raise error
        return result

    def map(self, function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], *, phase: str) -> list:
        """Each rank's failure reaches all ranks, so that none waits for one that is gone."""
        if self._is_main_section:
            return list(function(items))
        part, failure = [], None
        with self.phase(phase):
            try:
                part = list(function(self.split(items)))
            except Exception as error:
                if is_connection_lost(error):
                    raise
                failure = error
            outcomes = self.gather((part, None if failure is None else self._portable(failure)), phase=phase)
        if failure is not None:
            raise failure
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for results, _ in outcomes for result in results]

    @contextmanager
    def main_section(self) -> Iterator[None]:
        """Another thread of rank 0 still takes part in collectives."""
        assert self.is_main, "rank 0 alone"
        self._thread.is_main_section = True
        try:
            yield
        finally:
            self._thread.is_main_section = False

    @property
    def _is_main_section(self) -> bool:
        return getattr(self._thread, "is_main_section", False)

    # The end of a rank

    @property
    def _label(self) -> str:
        return f"`{self._phase}` of {self.context}" if self.context else f"`{self._phase}`"

    def fail(self, error: BaseException) -> None:
        """Announce that this rank ends with an error, and let those that wait for it know at once."""
        import torch.distributed as dist

        self._announce(json.dumps(describe_fault(error, f"rank {self.rank} failed in {self._failed_phase or 'npo'}")))
        if not self.is_main and self._device != "cuda":
            with suppress(Exception):
                dist.destroy_process_group()

    def finish(self) -> None:
        """After an error, rank 0 says that it printed it; the others wait for that, as their exit ends the job."""
        global _CURRENT
        _CURRENT = ProcessGroup()
        with suppress(Exception):
            if self.is_main:
                self._store.set("npo/reported", "")
            else:
                self._store.wait(["npo/reported"], timedelta(seconds=REPORT_SECONDS))

    def leave(self) -> None:
        """Wait until all ranks are done: none closes a connection that another one still needs."""
        import torch.distributed as dist

        with suppress(dist.DistError):
            self._store.set(f"npo/left/{self.rank}", "")
            if self.is_main:
                left = [f"npo/left/{rank}" for rank in range(self.world_size)]
                self._store.wait(left, timedelta(seconds=self.deadline))
                self._store.set("npo/reported", "")
            else:
                self._store.wait(["npo/reported"], timedelta(seconds=self.deadline))
            dist.destroy_process_group()

    def _announce(self, fault: str) -> None:
        """The first announcement counts."""
        with suppress(Exception):
            if not self._store.check([f"npo/end/{self.rank}"]):
                self._store.set(f"npo/end/{self.rank}", fault)

    def _describe_loss(self, label: str, seconds: float, error: Exception) -> BaseException:
        """The error for a lost connection. Other ranks than 0 stay silent while rank 0 is there to report it."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        until = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < until and not all(self._store.check([f"npo/end/{rank}"]) for rank in others):
            time.sleep(0.05)
        ends = {rank: self._store.get(f"npo/end/{rank}") for rank in others if self._store.check([f"npo/end/{rank}"])}
        self.reports_errors = self.is_main or 0 not in ends
        for said in filter(None, ends.values()):
            fault = json.loads(said)
            return (NpoError if fault["is_mistake"] else RunFailed)(fault["message"], fault["hint"])
        silent = [rank for rank in others if rank not in ends]
        if not silent:
            return RunFailed(f"the processes lost contact in {label}: {first_line(error)}", RESUME_HINT)
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        how = f"did not finish {label} within {self.deadline:g} s" if seconds >= self.deadline else f"died in {label}"
        return RunFailed(f"{names} {how}", RESUME_HINT)

    def _portable(self, error: Exception) -> Exception:
        """An error as another rank can raise it."""
        if isinstance(error, OSError):
            return error
        if isinstance(error, NpoError):
            kind = next(kind for kind in (StoppedEarly, RunFailed, NpoError) if isinstance(error, kind))
            return kind(error.message, error.hint)
        fault = describe_fault(error, f"rank {self.rank} failed in {self._label}")
        return RunFailed(fault["message"], fault["hint"])


def is_connection_lost(error: Exception) -> bool:
    """Whether a collective failed because of another rank; gloo's errors are RuntimeErrors that name its source."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def describe_fault(error: BaseException, where: str) -> dict[str, Any]:
    """What another rank reports of this rank's error."""
    if os.environ.get("NPO_DEBUG") == "1":
        text = "".join(traceback.format_exception(error))
        return {"is_mistake": False, "message": f"{where}: {text}", "hint": ""}
    if isinstance(error, NpoError):
        is_mistake = not isinstance(error, RunFailed)
        return {"is_mistake": is_mistake, "message": f"{where}: {error.message}", "hint": error.hint}
    text = f"{where}: {type(error).__name__}: {first_line(error)}"
    return {"is_mistake": False, "message": text, "hint": f"NPO_DEBUG=1 shows where it happened; {RESUME_HINT}"}


_CURRENT = ProcessGroup()


def current_group() -> ProcessGroup:
    """The ranks that run this command; one without a launcher."""
    return _CURRENT


@contextmanager
def join_job(launch: LaunchInfo) -> Iterator[LaunchedGroup]:
    """Be one of the job's ranks for the length of the block."""
    global _CURRENT
    _CURRENT = group = LaunchedGroup(launch)
    try:
        with group.phase("the command"):
            yield group
    except BaseException as error:
        # The group stays current until `finish`: it says whether this rank prints the error.
        group.fail(error)
        raise
    group.leave()
    _CURRENT = ProcessGroup()


def on_main_rank(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """For functions that write: all ranks call them, rank 0 alone carries them out, all get the result."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if _CURRENT.world_size == 1:
            return function(*args, **kwargs)
        phase = function.__name__.strip("_").replace("_", " ")
        return _CURRENT.run_on_main(partial(function, *args, **kwargs), phase=phase)

    return wrapped
