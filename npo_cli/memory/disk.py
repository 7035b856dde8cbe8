"""How much of a disk a run will take: checkpoints under its retention, AutoNPO's branches, and the journals."""

from collections.abc import Iterator

from npo_cli.config.recipe import Recipe
from npo_cli.registry import ENGINES
from npo_cli.types.memory import Allocation

TOKEN_BYTES, ROLLOUT_BYTES, STEP_BYTES = 24, 150, 1100
"""Of one recorded token (id, log-probability, text), of one rollout beside them, of one step's figures; fitted to a run
of the micro task."""


def estimate_disk_usage(
    recipe: Recipe, *, weights: int, optimizer_state: int, full_model: int, autonpo: bool
) -> Iterator[Allocation]:
    """Of the whole run; `weights` and `moments` are what one checkpoint takes, `served` the whole model, in bytes.

    A replay of AutoNPO is a branch with checkpoints of its own. What an unfinished scoring or a rollback protects
    beyond the quotas is not foreseen.
    """
    branches = [("the run's branch", recipe.train.num_steps)]
    rounds = max(1, recipe.autonpo.max_interventions) if autonpo else 0
    if rounds:
        branches.append(
            (f"up to {rounds} replays of AutoNPO", rounds * min(max(recipe.autonpo.rollback.distances), branches[0][1]))
        )
    for name, steps in branches:
        anchors, guides = count_kept_checkpoints(recipe, steps)
        # Before the first update there are no moments.
        size = anchors * (weights + optimizer_state) - optimizer_state + guides * weights
        yield _need(f"checkpoints of {name}", size, f"{anchors} full states, {guides} guides")
    steps = sum(each for _, each in branches)
    rollouts = steps * recipe.train.prompts_per_step * recipe.train.group_size
    each = ROLLOUT_BYTES + TOKEN_BYTES * recipe.sampling.max_new_tokens
    how = f"{rollouts:,} rollouts of at most {recipe.sampling.max_new_tokens:,} tokens"
    yield _need("journals", rollouts * each + steps * STEP_BYTES, how)
    answers = (
        count_guided_steps(recipe)
        * recipe.train.prompts_per_step
        * recipe.guide.cache.samples_per_prompt
        * (1 + rounds)
    )
    yield _need(
        "guide caches", answers * each, f"{answers:,} answers, {recipe.guide.cache.samples_per_prompt} a prompt"
    )
    if not ENGINES.get(recipe.engine.kind).runs_in_trainer:
        # A sync by nccl or ipc writes none.
        yield _need("weights for the server", full_model + weights, "in TMPDIR: those it starts from, and a sync's")


def count_guided_steps(recipe: Recipe) -> int:
    """Steps whose prompts a guide answers: the planned intervention's, else AutoNPO's longest."""
    planned = recipe.guide.replay
    if planned.num_steps is not None:
        return planned.num_steps
    if planned.at_step is not None and planned.guide_step is not None:
        return planned.guide_step - planned.at_step
    return min(max(recipe.autonpo.rollback.distances), recipe.train.num_steps)


def count_kept_checkpoints(recipe: Recipe, steps: int) -> tuple[int, int]:
    """Full states and weights-only guides that one branch keeps; step 0 and the newest are always full."""
    train = recipe.train
    saved = -(-steps // train.save_every) + 1
    anchors = saved if train.keep_full_checkpoints is None else min(saved, train.keep_full_checkpoints + 1)
    guides = saved - anchors
    return anchors, guides if train.keep_weights_only is None else min(guides, train.keep_weights_only)


def _need(what: str, num_bytes: int, how: str) -> Allocation:
    return Allocation(location="disk", phase="always", label=what, num_bytes=num_bytes, formula=how)
