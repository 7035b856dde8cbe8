"""Save a checkpoint with its training state, and restore from one."""

import time
from collections.abc import Callable

from torch.optim import Optimizer

from npo_cli.activity import Activity, report_activity
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError, quote_path
from npo_cli.policy.optimizer import (
    TrainerState,
    encode_state,
    load_state,
    read_moments,
    save_state,
    seed_random_state,
    write_state,
)
from npo_cli.policy.weights_io import copy_to_cpu
from npo_cli.session.learner import find_data_position
from npo_cli.session.session import Session
from npo_cli.session.startup import measure_startup
from npo_cli.storage.background import BackgroundWrite
from npo_cli.storage.checkpoints import (
    TRAINING_STATE_FOLDER,
    Checkpoint,
    create_checkpoint,
    measure_logs,
    verify_checkpoint,
)
from npo_cli.storage.costs import append_cost
from npo_cli.storage.files import check_disk_space, make_folder
from npo_cli.storage.layout import RunDir
from npo_cli.storage.retention import apply_retention
from npo_cli.types.guides import ReplayBuffer
from npo_cli.types.rollouts import CheckpointSaved

BACKGROUND_BYTES = 1_000_000_000
"""Of a checkpoint: with a model on the CPU, larger ones are not copied for the background by default."""


class CheckpointSaver:
    """Saves one branch's checkpoints, one at a time. `close` waits for the one that is being written.

    In the background (`train.save_in_background`) `start` copies weights and moments to CPU memory, and a thread writes
    them while the next step runs. The checkpoint gets its name once all is on the disk, so that a kill leaves it whole
    or not at all, and it records the logs as they were at its step.
    """

    def __init__(self, session: Session, optimizer: Optimizer, *, branch: str, reads_checkpoints: bool = False) -> None:
        """`reads_checkpoints`: what comes next reads this checkpoint, so that it is complete before that."""
        self.session, self.optimizer, self.branch = session, optimizer, branch
        self.in_background = not reads_checkpoints and saves_in_background(session)
        self._step: int | None = None
        """Of the checkpoint that was begun."""
        self._seconds = 0.0
        self._writing: BackgroundWrite[None] | None = None

    def start(self, state: TrainerState) -> None:
        """Begin to save the state of a step, or save it where that is not done in the background."""
        assert self._step is None, "the checkpoint before it is complete"
        report_activity(Activity(name="save"))
        began = time.perf_counter()
        # AdamW keeps two moments per weight.
        check_disk_space(self.session.run.root, 3 * self.session.policy.num_bytes)
        if self.in_background:
            self._writing = BackgroundWrite(self._copy(state), name="checkpoint writer")
        else:
            self._save(state)
        self._step, self._seconds = state.step, time.perf_counter() - began

    def finish(self) -> list[CheckpointSaved]:
        """Wait for the checkpoint that was begun, if any, and charge the time for which training stood still."""
        step, self._step = self._step, None
        writing, self._writing = self._writing, None
        if step is None:
            return []
        began = time.perf_counter()
        if writing is not None:
            writing.wait()
        seconds = self._seconds + time.perf_counter() - began
        append_cost(self.session.run, "save", branch=self.branch, step=step, seconds=seconds)
        report_activity(Activity(name=f"save step {step}", seconds=seconds))
        path = self.session.run.checkpoint_folder(self.branch, step).relative_to(self.session.run.root).as_posix()
        return [CheckpointSaved(branch=self.branch, step=step, path=path)]

    def close(self) -> None:
        """Wait for what is being written."""
        self.finish()

    def _save(self, state: TrainerState) -> None:
        with create_checkpoint(self.session.run, self.branch, state.step) as folder:
            self.session.policy.save(folder)
            make_folder(folder / TRAINING_STATE_FOLDER)
            save_state(folder / TRAINING_STATE_FOLDER, self.session.policy.model, self.optimizer, state=state)
        tidy_up(self.session, self.branch)

    def _copy(self, state: TrainerState) -> Callable[[], None]:
        session, branch, policy = self.session, self.branch, self.session.policy
        weights, moments = policy.copy_saved_weights(), copy_to_cpu(read_moments(policy.model, self.optimizer))
        streams, scalars = encode_state(state)
        log_sizes = measure_logs(session.run, branch)

        def write() -> None:
            with create_checkpoint(session.run, branch, state.step, log_sizes=log_sizes) as folder:
                policy.write_folder(folder, weights)
                make_folder(folder / TRAINING_STATE_FOLDER)
                whole = {name: value.contiguous() for name, value in moments.items()}
                write_state(folder / TRAINING_STATE_FOLDER, streams | whole, scalars)
            tidy_up(session, branch)

        return write


def saves_in_background(session: Session) -> bool:
    """What train.save_in_background says or, where it is null, whether the copy costs little: the model is on a GPU, or
    the checkpoint is small. Never with several processes, which save their shards together.
    """
    if current_group().is_launched or session.policy.sharding is not None:
        return False
    wanted, policy = session.recipe.train.save_in_background, session.policy
    return (policy.device.type != "cpu" or 3 * policy.num_bytes <= BACKGROUND_BYTES) if wanted is None else wanted


def save_checkpoint(session: Session, optimizer: Optimizer, state: TrainerState, *, branch: str) -> CheckpointSaved:
    """Save one checkpoint; it is there when this returns."""
    saver = CheckpointSaver(session, optimizer, branch=branch, reads_checkpoints=True)
    saver.start(state)
    (saved,) = saver.finish()
    return saved


def tidy_up(session: Session, branch: str) -> None:
    """Demote and delete the checkpoints that the recipe does not keep."""
    settings = session.recipe.train
    apply_retention(
        session.run,
        branch,
        keep_full_checkpoints=settings.keep_full_checkpoints,
        keep_weights_only=settings.keep_weights_only,
    )


@measure_startup("load", "the training state")
def restore_state(session: Session, optimizer: Optimizer, checkpoint: Checkpoint) -> TrainerState:
    """Restore optimizer, random streams and data position of a full checkpoint; the weights are loaded already."""
    require_training_state(session.run, checkpoint)
    return load_state(checkpoint.path / TRAINING_STATE_FOLDER, session.policy.model, optimizer)


def init_state_from_weights(session: Session, optimizer: Optimizer, checkpoint: Checkpoint) -> TrainerState:
    """The state at a weights-only checkpoint: a new optimizer, random streams from the seed, the data position."""
    optimizer.state.clear()
    seed_random_state(session.recipe.train.seed)
    position = find_data_position(session.run, checkpoint.branch, checkpoint.step)
    buffer = ReplayBuffer() if session.recipe.guide.experience.replay_fraction else None
    return TrainerState(step=checkpoint.step, position=position, running_metrics={}, replay_buffer=buffer)


def require_training_state(run: RunDir, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without an intact training state."""
    if not checkpoint.training_state_path.exists():
        raise NpoError(
            f"step {checkpoint.step} of {checkpoint.branch} has weights only; training cannot continue from it",
            f"choose a full checkpoint (npo index {quote_path(run.root)}), or start with a new optimizer: "
            f"npo resume {quote_path(run.root)} --at {checkpoint.step} --no-guide --fresh-optimizer",
        )
    verify_checkpoint(checkpoint, training_state=True)
