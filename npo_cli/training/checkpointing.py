"""Checkpoints as stages see them: what a save writes, what a restore brings back."""

from torch.optim import Optimizer

from npo_cli.errors import NpoError, quote_path
from npo_cli.policy.optimizer import TrainerState, load_state, save_state, seed_random_state
from npo_cli.session.learner import find_data_position
from npo_cli.session.session import Session
from npo_cli.storage.checkpoints import Checkpoint, create_checkpoint, verify_checkpoint
from npo_cli.storage.files import check_disk_space, make_folder
from npo_cli.storage.layout import RunDir
from npo_cli.storage.retention import apply_retention
from npo_cli.types.guides import ReplayBuffer

TRAINING_STATE_FOLDER = "training_state"


def save_checkpoint(session: Session, optimizer: Optimizer, state: TrainerState, *, branch: str) -> None:
    """Weights as a Hugging Face folder, everything else in its training_state/; then let retention tidy up."""
    # The optimiser keeps two moments of each weight.
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


def restore_state(session: Session, optimizer: Optimizer, checkpoint: Checkpoint) -> TrainerState:
    """Optimiser, random streams and cursor of an anchor; the weights are loaded already."""
    require_training_state(session.run, checkpoint)
    return load_state(checkpoint.path / TRAINING_STATE_FOLDER, session.policy.model, optimizer)


def init_state_from_weights(session: Session, optimizer: Optimizer, checkpoint: Checkpoint) -> TrainerState:
    """What a step needs where only weights were saved: moments of nothing, streams from the seed, the data cursor."""
    optimizer.state.clear()
    seed_random_state(session.recipe.train.seed)
    position = find_data_position(session.run, checkpoint.branch, checkpoint.step)
    memory = ReplayBuffer() if session.recipe.guide.experience.replay_fraction else None
    return TrainerState(step=checkpoint.step, position=position, running_metrics={}, replay_buffer=memory)


def require_training_state(run: RunDir, checkpoint: Checkpoint) -> None:
    """Only an anchor, whole to the last byte, can be gone on from."""
    if not checkpoint.training_state_path.exists():
        raise NpoError(
            f"step {checkpoint.step} of {checkpoint.branch} is a guide (weights only); training cannot go on from it",
            f"choose an anchor (npo index {quote_path(run.root)}), or begin the optimizer anew: "
            f"npo resume {quote_path(run.root)} --at {checkpoint.step} --fresh-optimizer",
        )
    verify_checkpoint(checkpoint, training_state=True)
