"""Merged starts: a branch begins with theta + w (theta_plus - theta_minus), theta being the checkpoint that it forks.

Task arithmetic (arXiv 2212.04089) on the checkpoints of a run. Rejoin: theta is the end of a replay, plus the
unguided run at the same step, minus the step that both come from, so that the replay regains w of the motion that was
rolled back. Checkpoint averaging: theta_minus is theta, (1 - w) theta + w theta_plus.

Optimizer state, data position and random streams are those of theta: its trajectory is the one that continues, and
moments are running means of gradients along it. The merged weights become the branch's checkpoint of its fork step.
"""

from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from npo_cli.policy.fsdp import local_tensor
from npo_cli.policy.optimizer import TrainerState
from npo_cli.session.session import Session, load_checkpoint
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.training.checkpointing import save_checkpoint
from npo_cli.training.evaluate import evaluate_policy
from npo_cli.types.rollouts import CheckpointSaved, EvalReport, Segment


@torch.no_grad()
def merge_weights(session: Session, segment: Segment) -> None:
    """Replace theta, which the policy holds, by theta + w (theta_plus - theta_minus), computed in float32.

    Elementwise, so a rank computes its shards alone. Two more copies of the weights are in memory meanwhile.
    """
    assert segment.merge_weight is not None
    policy, run = session.policy, session.run
    own = {name: local_tensor(parameter) for name, parameter in policy.model.named_parameters()}
    kept = {name: tensor.clone() for name, tensor in own.items()}
    plus, minus = (find_checkpoint(run, *place) for place in segment.merged_checkpoints)
    load_checkpoint(policy, plus)
    added = {name: tensor.to(torch.float32, copy=True) for name, tensor in own.items()}
    load_checkpoint(policy, minus)
    for name, tensor in own.items():
        motion = added.pop(name) - tensor.float()
        tensor.copy_(kept.pop(name).float() + segment.merge_weight * motion)
    policy.mark_weights_changed()


def save_merged_start(
    session: Session, optimizer: Optimizer, state: TrainerState, *, branch: str
) -> Iterator[EvalReport | CheckpointSaved]:
    """Evaluate the merged weights if eval.every is set, and save them as the branch's checkpoint of its fork step."""
    if session.recipe.eval.every:
        yield evaluate_policy(session, branch=branch, step=state.step)
    yield save_checkpoint(session, optimizer, state, branch=branch)
