"""What a rollback restores besides the weights: optimizer state, data position and seeds (`autonpo.rollback`).

By default all but the sampling seeds are those of the old step. The other choices are ablations. The fork itself, a new
branch at an earlier checkpoint, is in `start_point.py` and `resume.py`; how far AutoNPO goes back, in
`autonpo/rollback_choice.py`.
"""

from dataclasses import replace

from torch.optim import Optimizer

from npo_cli.config.loading import recipe_from_dict
from npo_cli.policy.optimizer import TrainerState, load_moments
from npo_cli.session.learner import find_data_position
from npo_cli.session.session import Session
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint, find_resume_checkpoint
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment
from npo_cli.training.checkpointing import TRAINING_STATE_FOLDER, require_training_state
from npo_cli.types.rollouts import Segment


def find_seed_name(run: RunDir, branch: str) -> str:
    """The branch whose name enters the sampling seeds: with autonpo.rollback.seed=same its parent's."""
    first = find_first_segment(run, branch)
    recipe = recipe_from_dict(run.read_recipe(branch), source=str(run.recipe_path(branch)))
    if first.parent is None or recipe.autonpo.rollback.seed == "fresh":
        return branch
    return find_seed_name(run, first.parent)


def apply_rollback_settings(
    session: Session, optimizer: Optimizer, state: TrainerState, *, branch_segment: Segment
) -> TrainerState:
    """The first state of a new branch, given the state at its fork step."""
    settings = session.recipe.autonpo.rollback
    if branch_segment.parent is None or state.step != branch_segment.fork_step:
        return state
    if settings.optimizer == "reset":
        optimizer.state.clear()
    elif settings.optimizer == "keep_current":
        current = _find_current_policy(session.run, branch_segment)
        require_training_state(session.run, current)
        load_moments(current.path / TRAINING_STATE_FOLDER, session.policy.model, optimizer)
    if settings.data == "onward":
        current = _find_current_policy(session.run, branch_segment)
        return replace(state, position=find_data_position(session.run, branch_segment.parent, current.step))
    return state


def _find_current_policy(run: RunDir, segment: Segment) -> Checkpoint:
    """The policy from before the rollback: the guide, or without one the parent's newest checkpoint."""
    assert segment.parent is not None
    guide_step = None if segment.guide_cache is None else load_guide(run, segment.guide_cache)[0].guide_step
    if guide_step is None:
        return find_resume_checkpoint(run, segment.parent)
    return find_checkpoint(run, segment.parent, guide_step)
