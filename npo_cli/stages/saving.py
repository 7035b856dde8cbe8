"""Checkpoints as stages see them: what a save writes, what a restore brings back."""

from torch.optim import Optimizer

from npo_cli.errors import NpoError, as_typed
from npo_cli.guide_records import Experience
from npo_cli.policy.optimizer import TrainerState, seed_streams
from npo_cli.run_dir.checkpoints import Checkpoint, new_checkpoint, require_whole
from npo_cli.run_dir.files import require_space
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.retention import apply_retention
from npo_cli.stages.segment import position_at
from npo_cli.stages.together import load_training_state, replace_moments, save_training_state
from npo_cli.stages.world import World

ANCHOR = "anchor"


def save_checkpoint(world: World, optimizer: Optimizer, state: TrainerState, *, branch: str) -> None:
    """Weights as a Hugging Face folder, everything else in its anchor/; then let retention tidy up."""
    # The optimiser keeps two moments of each weight.
    require_space(world.run.root, 3 * world.policy.num_bytes)
    with new_checkpoint(world.run, branch, state.step) as folder:
        world.policy.save(folder)
        (folder / ANCHOR).mkdir()
        save_training_state(folder / ANCHOR, world.policy, optimizer, state=state)
    settings = world.recipe.train
    apply_retention(
        world.run, branch, keep_anchors=settings.keep_full_checkpoints, keep_guides=settings.keep_weights_only
    )


def restore_state(world: World, optimizer: Optimizer, checkpoint: Checkpoint) -> TrainerState:
    """Optimiser, random streams and cursor of an anchor; the weights are loaded already."""
    need_state(world.run, checkpoint)
    return load_training_state(checkpoint.path / ANCHOR, world.policy, optimizer)


def fresh_state(world: World, optimizer: Optimizer, checkpoint: Checkpoint) -> TrainerState:
    """What a step needs where only weights were saved: moments of nothing, streams from the seed, the data cursor."""
    replace_moments(world.policy, optimizer, None)
    seed_streams(world.recipe.train.seed)
    position = position_at(world.run, checkpoint.branch, checkpoint.step)
    memory = Experience() if world.recipe.guide.experience.replay_fraction else None
    return TrainerState(step=checkpoint.step, position=position, trackers={}, experience=memory)


def need_state(run: RunDir, checkpoint: Checkpoint) -> None:
    """Only an anchor, whole to the last byte, can be gone on from."""
    if not checkpoint.anchor_path.exists():
        raise NpoError(
            f"step {checkpoint.step} of {checkpoint.branch} is a guide (weights only); training cannot go on from it",
            f"choose an anchor (npo index {as_typed(run.root)}), or begin the optimizer anew: "
            f"npo resume {as_typed(run.root)} --at {checkpoint.step} --fresh-optimizer",
        )
    require_whole(checkpoint, anchor=True)
