"""Save a checkpoint with its training state, and restore from one."""

import time

from torch.optim import Optimizer

from npo_cli.activity import Activity, report_activity
from npo_cli.errors import NpoError, quote_path
from npo_cli.policy.optimizer import TrainerState, load_state, save_state, seed_random_state
from npo_cli.session.learner import find_data_position
from npo_cli.session.session import Session
from npo_cli.session.startup import measure_startup
from npo_cli.storage.checkpoints import TRAINING_STATE_FOLDER, Checkpoint, create_checkpoint, verify_checkpoint
from npo_cli.storage.costs import append_cost
from npo_cli.storage.files import check_disk_space, make_folder
from npo_cli.storage.layout import RunDir
from npo_cli.storage.retention import apply_retention
from npo_cli.types.guides import ReplayBuffer
from npo_cli.types.rollouts import CheckpointSaved


def save_checkpoint(session: Session, optimizer: Optimizer, state: TrainerState, *, branch: str) -> CheckpointSaved:
    """Weights as a Hugging Face folder, everything else in its training_state/; then let retention tidy up."""
    report_activity(Activity(name="save"))
    began = time.perf_counter()
    # AdamW keeps two moments per weight.
    check_disk_space(session.run.root, 3 * session.policy.num_bytes)
    with create_checkpoint(session.run, branch, state.step) as folder:
        session.policy.save(folder)
        make_folder(folder / TRAINING_STATE_FOLDER)
        save_state(folder / TRAINING_STATE_FOLDER, session.policy.model, optimizer, state=state)
    settings = session.recipe.train
    apply_retention(
        session.run,
        branch,
        keep_full_checkpoints=settings.keep_full_checkpoints,
        keep_weights_only=settings.keep_weights_only,
    )
    seconds = time.perf_counter() - began
    append_cost(session.run, "save", branch=branch, step=state.step, seconds=seconds)
    report_activity(Activity(name=f"save step {state.step}", seconds=seconds))
    folder = session.run.checkpoint_folder(branch, state.step)
    return CheckpointSaved(branch=branch, step=state.step, path=folder.relative_to(session.run.root).as_posix())


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
