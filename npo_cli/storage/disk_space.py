"""Disk space of a run: what its checkpoints, logs and guide caches take, in closed form from the recipe.

Checkpoints are exact; logs are an upper bound for responses of full length.
"""

from collections.abc import Iterator
from pathlib import Path

from npo_cli.config.recipe import Recipe

TOKEN_BYTES, ROLLOUT_BYTES, STEP_BYTES = 16, 150, 1100
"""Log size per token (id, log-probability, text), per rollout and per step; fitted to a run of the micro task."""
DiskItem = tuple[str, int, str]
"""What it is, its bytes, and the product behind them."""


def estimate_disk(recipe: Recipe, *, weights_bytes: int, state_bytes: int, autonpo: bool = False) -> Iterator[DiskItem]:
    """What the whole run takes, given the size of one checkpoint's weights and of its optimizer state.

    Each of AutoNPO's replays is a branch with its own checkpoints. Checkpoints that scoring or a rollback protects
    beyond the retention settings are not counted.
    """
    max_distance, train = max(recipe.autonpo.rollback.distances), recipe.train
    branches = [("the run's branch", train.num_steps)]
    replays = max(1, recipe.autonpo.max_interventions) if autonpo else 0
    if replays:
        branches.append((f"up to {replays} replays", replays * min(max_distance, train.num_steps)))
    for name, steps in branches:
        full, weights_only = count_kept_checkpoints(recipe, steps)
        size = checkpoint_bytes(recipe, steps, weights_bytes=weights_bytes, state_bytes=state_bytes)
        yield f"checkpoints of {name}", size, f"{full} full, {weights_only} weights only"
    steps = sum(each for _, each in branches)
    rollouts = steps * train.prompts_per_step * train.group_size
    per_rollout = ROLLOUT_BYTES + TOKEN_BYTES * recipe.sampling.max_new_tokens
    formula = f"{rollouts:,} rollouts of at most {recipe.sampling.max_new_tokens:,} tokens"
    yield "logs", rollouts * per_rollout + steps * STEP_BYTES, formula
    samples = recipe.guide.cache.samples_per_prompt
    responses = count_guided_steps(recipe) * train.prompts_per_step * samples * (1 + replays)
    yield "guide caches", responses * per_rollout, f"{responses:,} responses, {samples} per prompt"


def checkpoint_bytes(recipe: Recipe, steps: int, *, weights_bytes: int, state_bytes: int) -> int:
    """Bytes of the checkpoints that one branch of this length keeps."""
    full, weights_only = count_kept_checkpoints(recipe, steps)
    # Step 0 has no optimizer state yet.
    return full * (weights_bytes + state_bytes) - state_bytes + weights_only * weights_bytes


def count_guided_steps(recipe: Recipe) -> int:
    """Steps with a guide: those of guide.replay, else AutoNPO's longest rollback."""
    replay = recipe.guide.replay
    if replay.num_steps is not None:
        return replay.num_steps
    if replay.at_step is not None and replay.guide_step is not None:
        return replay.guide_step - replay.at_step
    return min(max(recipe.autonpo.rollback.distances), recipe.train.num_steps)


def count_kept_checkpoints(recipe: Recipe, steps: int) -> tuple[int, int]:
    """Full and weights-only checkpoints that one branch keeps; step 0 and the newest are always full."""
    train = recipe.train
    saved = -(-steps // train.save_every) + 1
    full = saved if train.keep_full_checkpoints is None else min(saved, train.keep_full_checkpoints + 1)
    weights_only = saved - full
    return full, weights_only if train.keep_weights_only is None else min(weights_only, train.keep_weights_only)


def find_existing_parent(path: Path) -> Path:
    """The folder itself, or the innermost one around it that exists: where its files will lie."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())
