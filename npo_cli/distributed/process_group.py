"""Several processes at one command: rank 0 leads, the others do their share of each common piece of work.

Rank 0 names the next piece in the launcher's store, where the others wait for it without limit: it may be verifying or
writing. From then on the process group's deadline holds. Whoever loses contact says so in the store, and so does
whoever fails: the one that says nothing is the one that died or hangs. PARALLEL.md tells why it is done this way.
"""

import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch.optim import Optimizer
from transformers import PreTrainedModel

from npo_cli.distributed.launch import LaunchInfo
from npo_cli.errors import NpoError, RunFailed

JOIN, STOP = "join", "stop"
REPORT_SECONDS = 3.0
"""Seconds in which a process that only waited for another says so."""
DAY = timedelta(days=1)
RESUME_HINT = "npo resume RUN goes on from the last checkpoint"


@dataclass(kw_only=True)
class Worker:
    """What one process holds: its shards of each model, and of the optimiser's state."""

    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    """By the name under which the pieces of work speak of them."""
    optimizer: Optimizer | None = None
    worker_group: "WorkerGroup" = field(init=False)


class WorkerTask(Protocol):
    """Common work, as one process is told of it."""

    @property
    def phase(self) -> str:
        """What it is, for people."""

    def run(self, member: Any) -> Any:
        """Do this process's share; the answer goes to rank 0."""


class WorkerGroup:
    """All processes of the job, seen from one of them."""

    def __init__(self, place: LaunchInfo, member: Worker) -> None:
        self.rank, self.world_size, self.worker = place.rank, place.world_size, member
        member.worker_group = self
        self.deadline = 0.0
        """Seconds; 0 before anybody has joined."""
        self.context = ""
        """Added to a phase: `step 7`."""
        self._store = next(dist.rendezvous("env://"))[0]
        self._num_orders = 0

    def join(self, *, deadline: float, device: str) -> None:
        """Rank 0 calls the others together; a second call does nothing."""
        if not self.deadline:
            self._order({"phase": JOIN, "deadline": deadline, "device": device})
            with self._told_apart(JOIN):
                self._meet(deadline, device)

    def scatter(self, pieces: Sequence[WorkerTask]) -> list[Any]:
        """One piece a process, by rank; the answers, by rank."""
        mine, *others = pieces
        phase = f"`{mine.phase}` of {self.context}" if self.context else f"`{mine.phase}`"
        self._order({"phase": phase})
        with self._told_apart(phase):
            dist.scatter_object_list([None], [None, *others], src=0)
            answer = mine.run(self.worker)
            answers = [None] * self.world_size
            # The own answer may be a whole model: it stays here.
            dist.gather_object(None, answers, dst=0)
            # Everybody has read it, or there would be no answers.
            self._store.delete_key(f"npo/order/{self._num_orders - 1}")
        return [answer, *answers[1:]]

    def broadcast(self, piece: WorkerTask) -> list[Any]:
        """The same piece to every process."""
        return self.scatter([piece] * self.world_size)

    def serve(self) -> None:
        """The whole life of any other rank: piece after piece, until rank 0 says that it is over."""
        while (order := self._next_order())["phase"] != STOP:
            with self._told_apart(order["phase"]):
                if order["phase"] == JOIN:
                    self._meet(order["deadline"], order["device"])
                    continue
                box: list[Any] = [None]
                dist.scatter_object_list(box, None, src=0)
                dist.gather_object(box[0].run(self.worker), None, dst=0)
        self._store.set(f"npo/left/{self.rank}", "")

    def shut_down(self, *, failed: bool) -> None:
        """Rank 0 has no more work: whoever waits for some may leave."""
        with suppress(dist.DistError):
            if failed:
                self._say_end("")
            self._order({"phase": STOP})
            if not failed:
                # The store may end with this process: let them read it.
                left = [f"npo/left/{rank}" for rank in range(1, self.world_size)]
                self._store.wait(left, timedelta(seconds=REPORT_SECONDS))
        if self.deadline and not failed:
            dist.destroy_process_group()

    # Orders, in the store of the launcher

    def _order(self, order: dict[str, Any]) -> None:
        self._store.set(f"npo/order/{self._num_orders}", json.dumps(order))
        self._num_orders += 1

    def _next_order(self) -> dict[str, Any]:
        key = f"npo/order/{self._num_orders}"
        while True:
            try:
                self._store.wait([key], DAY)
                break
            except dist.DistStoreError:
                continue
            except dist.DistNetworkError as error:
                raise RunFailed("rank 0, or the launcher, is gone", RESUME_HINT) from error
        self._num_orders += 1
        return json.loads(self._store.get(key))

    def _meet(self, deadline: float, device: str) -> None:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = dist.PrefixStore("npo/group", self._store)
        patience = timedelta(seconds=deadline)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=patience)
        dist.barrier()
        self.deadline = deadline

    # Who is missing

    @contextmanager
    def _told_apart(self, phase: str) -> Iterator[None]:
        """Failures of this process are said to the others; of another one that is lost, rank and phase are named."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            if not is_connection_lost(error):
                self._say_end(json.dumps(_as_fault(error, f"rank {self.rank} failed in {phase}")))
                raise
            self._say_end("")
            raise self._loss(phase, time.monotonic() - began, error) from error

    def _say_end(self, text: str) -> None:
        self._store.set(f"npo/end/{self.rank}", text)

    def _loss(self, phase: str, seconds: float, error: Exception) -> BaseException:
        """What is to be said of a lost contact; nothing by others while rank 0 is there to say it."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        until = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < until and not all(self._store.check([f"npo/end/{rank}"]) for rank in others):
            time.sleep(0.05)
        ends = {rank: self._store.get(f"npo/end/{rank}") for rank in others if self._store.check([f"npo/end/{rank}"])}
        if 0 in ends:
            return SystemExit(1)
        for said in filter(None, ends.values()):
            fault = json.loads(said)
            return (NpoError if fault["mistake"] else RunFailed)(fault["message"], fault["hint"])
        silent = [rank for rank in others if rank not in ends]
        if not silent:
            return RunFailed(f"the processes lost contact in {phase}: {_first_line(error)}", RESUME_HINT)
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        hung = seconds >= self.deadline > 0
        how = f"did not finish {phase} within {self.deadline:g} s" if hung else f"died in {phase}"
        return RunFailed(f"{names} {how}", RESUME_HINT)


def is_connection_lost(error: Exception) -> bool:
    """Whether a collective failed because of another process; gloo's are RuntimeErrors that name its source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _as_fault(error: Exception, who: str) -> dict[str, Any]:
    if os.environ.get("NPO_DEBUG") == "1":
        return {"mistake": False, "message": f"{who}: {traceback.format_exc()}", "hint": ""}
    if isinstance(error, NpoError):
        mistake = not isinstance(error, RunFailed)
        return {"mistake": mistake, "message": f"{who}: {error.message}", "hint": error.hint}
    text = f"{who}: {type(error).__name__}: {_first_line(error)}"
    return {"mistake": False, "message": text, "hint": f"NPO_DEBUG=1 shows where it happened; {RESUME_HINT}"}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


_TEAM: ContextVar[WorkerGroup | None] = ContextVar("team", default=None)


def current_worker_group() -> WorkerGroup | None:
    """The team that this process leads; None where it works alone."""
    return _TEAM.get()


@contextmanager
def lead_workers(place: LaunchInfo, worker: Worker) -> Iterator[None]:
    """Rank 0 for the length of a command; however it ends, the others are told."""
    team, failed = WorkerGroup(place, worker), True
    known = _TEAM.set(team)
    try:
        yield
        failed = False
    finally:
        _TEAM.reset(known)
        team.shut_down(failed=failed)
