"""The disk space that a training will take, before it starts."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.policy.model import Policy
from npo_cli.report.table import format_bytes
from npo_cli.storage.disk_space import checkpoint_bytes, count_kept_checkpoints, estimate_disk, find_existing_parent
from npo_cli.types.views import PlannedWork

MOMENTS = {"adamw": 2, "adafactor": 0}
"""Numbers of optimizer state per weight; Adafactor's rows and columns are few."""


def check_disk_space(root: Path, recipe: Recipe, policy: Policy, *, last_step: int) -> None:
    """Refuse a run whose checkpoints alone, which are counted exactly, are larger than the free space."""
    weights = policy.num_bytes
    state = MOMENTS[recipe.train.optimizer] * weights
    needed, free = checkpoint_bytes(recipe, last_step, weights_bytes=weights, state_bytes=state), free_bytes(root)
    if needed > free:
        full, weights_only = count_kept_checkpoints(recipe, last_step)
        raise NpoError(
            f"the run does not fit on the disk of {root}: its {full + weights_only} checkpoints take "
            f"{format_bytes(needed)}, {format_bytes(free)} are free",
            "set train.keep_full_checkpoints=2 and train.keep_weights_only=10, a larger train.save_every, or choose "
            "another disk",
        )


def describe_disk(root: Path, recipe: Recipe, policy: Policy, *, last_step: int) -> str:
    """One line: what the run will take at most, and what is free."""
    total = sum(work.num_bytes or 0 for work in plan_disk(root, recipe, policy, last_step=last_step))
    return f"disk: at most {format_bytes(total)} for checkpoints and logs; {format_bytes(free_bytes(root))} are free"


def plan_disk(
    root: Path, recipe: Recipe, policy: Policy, *, last_step: int, first_step: int = 1
) -> Iterator[PlannedWork]:
    """Checkpoints and logs of the steps `first_step` to `last_step` of a branch; step 0 of a new run included."""
    steps, weights = last_step - first_step + 1, policy.num_bytes
    shorter = recipe.model_copy(update={"train": recipe.train.model_copy(update={"num_steps": steps})})
    state, known = MOMENTS[recipe.train.optimizer] * weights, int(first_step > 1)
    sizes = {label: size for label, size, _ in estimate_disk(shorter, weights_bytes=weights, state_bytes=state)}
    count = sum(count_kept_checkpoints(shorter, steps)) - known
    kept = checkpoint_bytes(shorter, steps, weights_bytes=weights, state_bytes=state) - known * weights
    yield PlannedWork(work=f"checkpoints: {count}", num_bytes=kept)
    yield PlannedWork(work="logs", num_bytes=sizes["logs"])


def free_bytes(root: Path) -> int:
    """Free space where a run directory is or will be."""
    return shutil.disk_usage(find_existing_parent(root)).free
