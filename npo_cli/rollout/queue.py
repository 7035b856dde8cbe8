"""The queue of asynchronous sampling: batches of the next steps, built in a thread while the learner learns.

With train.staleness = k the rollouts of step s come from the policy of v(s) = max(f, s - 1 - k), f being the step that
the branch forks at. The learner asks for a batch as soon as these weights exist, one after the other, since the data
position of a step follows from the step before it. Which batch is ready when decides nothing.

The learner alone reads and writes the log. Before it saves a checkpoint it records the next k steps, whose policies
are older than the checkpoint; after a restart they are read back like any recorded step.

Of several ranks, rank 0 has the thread, and sends each batch to the others when it is taken.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue

from npo_cli.activity import Activity, report_activity
from npo_cli.errors import NpoError, quote_path
from npo_cli.rollout.batch import (
    ActiveGuide,
    StepBatch,
    assemble_batch,
    plan_next_batch,
    record_batch,
    select_cached_guides,
)
from npo_cli.rollout.revisits import Revisits
from npo_cli.session.producer import QueueEngine
from npo_cli.session.session import Session
from npo_cli.storage.costs import append_cost
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Group

CLOSE_SECONDS = 1.0
"""For the thread to end; a verifier may keep it longer, and that is not waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedBatch:
    """A batch that rank 0 has built or is building."""

    step: int
    sampler_step: int
    recorded: Sequence[Group]
    built: "Future[tuple[StepBatch, float]]"
    """The batch, and the seconds that building it took; on rank 0."""


class RolloutQueue:
    """Batches of the steps after `step`, in order. `close` drops what is still being sampled.

    `last_step`: no batch is built for a later one. `position`: in the data order, of the first batch. `revisits`: of
    the steps up to `step`; each batch is built after the one before it, and so from the groups of every earlier step.
    """

    def __init__(
        self,
        session: Session,
        log: RolloutLog,
        *,
        branch: str,
        seed_name: str,
        fork_step: int,
        step: int,
        last_step: int,
        position: int,
        active_guide: ActiveGuide | None,
        choose_group_size: Callable[[int], int | None],
        revisits: Revisits | None = None,
    ) -> None:
        """`choose_group_size`: rollouts per prompt of a step; None: train.group_size."""
        assert session.producer is not None, "train.staleness is above 0"
        self.session, self.log, self.branch, self.seed_name = session, log, branch, seed_name
        self.fork_step, self.last_step = fork_step, last_step
        self.active_guide, self.revisits = active_guide, revisits
        self.choose_group_size = choose_group_size
        self.staleness = session.recipe.train.staleness
        self._engine = QueueEngine(session.producer, session.policy)
        self._batches: dict[int, QueuedBatch] = {}
        self._on_record: set[int] = set()
        self._next_step = step + 1
        self._waiting: SimpleQueue[QueuedBatch | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._build_batches, args=(position,), name="rollout queue", daemon=True)
        if session.distributed.is_main:
            self._thread.start()

    def fill(self, step: int) -> None:
        """Ask for the batches that the policy of `step` samples, whose weights the session holds now.

        Recorded batches need no weights.
        """
        while self._next_step <= min(step + 1 + self.staleness, self.last_step):
            wanted = self._next_step
            sampler_step = max(self.fork_step, wanted - 1 - self.staleness)
            recorded = self.log.read_step(wanted) or ()
            if recorded:
                self._on_record.add(wanted)
            else:
                self._publish(wanted, sampler_step, step)
            batch = QueuedBatch(step=wanted, sampler_step=sampler_step, recorded=recorded, built=Future())
            self._batches[wanted] = batch
            self._waiting.put(batch)
            self._next_step += 1

    def take(self, step: int) -> tuple[StepBatch, float]:
        """The batch of a step, on record, and the seconds that building it took; waits for it."""
        found = self._record(step)
        del self._batches[step]
        self._on_record.remove(step)
        return found

    def record_ahead(self, step: int) -> None:
        """Record the batches of the k steps after `step`, whose policies no checkpoint of `step` brings back."""
        for ahead in range(step + 1, min(step + self.staleness, self.last_step) + 1):
            if ahead in self._on_record:
                continue
            began = time.perf_counter()
            batch, _ = self._record(ahead)
            # When the step is trained, its own line has the tokens, and only the seconds of this one still count.
            append_cost(
                self.session.run,
                "ahead",
                branch=self.branch,
                step=ahead,
                tokens=batch.num_generated_tokens,
                seconds=time.perf_counter() - began,
            )
        self.log.wait()

    def close(self) -> None:
        """End the thread."""
        self._engine.close()
        self._waiting.put(None)
        if self.session.distributed.is_main:
            self._thread.join(CLOSE_SECONDS)

    def _publish(self, wanted: int, sampler_step: int, step: int) -> None:
        if sampler_step != step:
            run = quote_path(self.session.run.root)
            raise NpoError(
                f"the rollouts of step {wanted} of {self.branch} are not on record, and the policy of step "
                f"{sampler_step}, which samples them, is gone",
                f"fork a branch there: npo resume {run} --branch {self.branch} --at {step} --no-guide",
            )
        self._engine.publish(step)

    def _record(self, step: int) -> tuple[StepBatch, float]:
        built = self._batches[step].built
        if not built.done():
            report_activity(Activity(name="wait for rollouts"))
        batch, seconds = self.session.distributed.run_on_main(built.result, phase="wait for rollouts")
        if step not in self._on_record:
            record_batch(self.log, step, batch)
            self._on_record.add(step)
        return batch, seconds

    def _build_batches(self, position: int) -> None:
        """In the thread: build one batch after the other, the first from the data position `position` on."""
        session = replace(self.session, engine=self._engine, sync=self._engine)
        while (batch := self._waiting.get()) is not None:
            began = time.perf_counter()
            try:
                with session.distributed.main_section():
                    batch_plan = None
                    group_size = self.choose_group_size(batch.step)
                    if group_size is not None:
                        batch_plan = plan_next_batch(
                            session,
                            seed_name=self.seed_name,
                            step=batch.step,
                            position=position,
                            guides=select_cached_guides(self.active_guide, batch.step),
                            group_size=group_size,
                            revisits=self.revisits,
                        )
                    built = assemble_batch(
                        session,
                        batch.recorded,
                        seed_name=self.seed_name,
                        step=batch.step,
                        sampler_step=batch.sampler_step,
                        position=position,
                        active_guide=self.active_guide,
                        revisits=self.revisits,
                        batch_plan=batch_plan,
                    )
            except Exception as error:  # raised by the learner, who waits for it
                batch.built.set_exception(error)
                return
            position = built.position
            batch.built.set_result((built, time.perf_counter() - began))
