"""Settings under which AutoNPO could never step in, or never get anywhere: refused before training starts."""

from npo_cli.config import Recipe
from npo_cli.errors import NpoError
from npo_cli.guide.hindsight import TWO_SIDED


def usable_deltas(recipe: Recipe) -> tuple[int, ...]:
    """Rollback distances that end at a checkpoint: multiples of train.save_every."""
    return tuple(delta for delta in recipe.auto.deltas if delta % recipe.train.save_every == 0)


def longest_slice(recipe: Recipe, *, num_prompts: int) -> int:
    """Most distinct prompts that a replay of the largest usable distance can visit."""
    farthest = min(usable_deltas(recipe)[-1], recipe.train.num_steps)
    return min(recipe.pool.size, num_prompts, farthest * recipe.train.prompts_per_step)


def refuse_impossible(recipe: Recipe, num_prompts: int) -> None:
    """The key that is wrong, and what would be right."""
    refuse_unreachable(recipe)
    refuse_silent(recipe)
    refuse_vain(recipe)
    refuse_endless(recipe)
    refuse_early(recipe)
    most = longest_slice(recipe, num_prompts=num_prompts)
    for key, wanted in (("probe.prompts", recipe.probe.prompts), ("auto.pool_min", recipe.auto.pool_min)):
        if wanted > most:
            raise NpoError(
                f"{key} is {wanted}, but at most {most} prompts can have failed within the largest distance "
                f"(pool.size {recipe.pool.size}, {num_prompts} training prompts, "
                f"{recipe.train.prompts_per_step} a step)",
                f"{key}={most} or less",
            )


def refuse_unreachable(recipe: Recipe) -> None:
    """A rollback needs a full state at its distance, and steps to go back over."""
    auto, train, usable = recipe.auto, recipe.train, usable_deltas(recipe)
    if not usable:
        raise NpoError(
            f"none of auto.deltas ({', '.join(map(str, auto.deltas))}) is a multiple of train.save_every "
            f"({train.save_every}): no checkpoint to go back to",
            f"auto.deltas=[{train.save_every},{2 * train.save_every}], or a smaller train.save_every",
        )
    # The newest state is the guide's own; the one to go back to comes on top.
    needed = usable[-1] // train.save_every + 1
    if train.keep_anchors is not None and train.keep_anchors < needed:
        raise NpoError(
            f"train.keep_anchors is {train.keep_anchors}: a rollback by {usable[-1]} steps (auto.deltas) needs "
            f"{needed} full states {train.save_every} steps apart, the newest one counted",
            f"train.keep_anchors={needed}, or smaller auto.deltas",
        )
    if usable[0] >= train.num_steps:
        raise NpoError(
            f"auto.deltas begin at {usable[0]}, and the run has only {train.num_steps} steps (train.num_steps)",
            "smaller auto.deltas and train.save_every, or more train.num_steps",
        )


def refuse_silent(recipe: Recipe) -> None:
    """Warm-up, window and patience must leave a step at which a warning could come."""
    auto, num_steps = recipe.auto, recipe.train.num_steps
    if auto.max == 0:
        return
    first = max(auto.warmup, auto.window) + auto.patience
    if first > num_steps:
        parts = {"auto.warmup": auto.warmup, "auto.window": auto.window, "auto.patience": auto.patience}
        key = max(parts, key=lambda name: parts[name])
        rest = max(auto.warmup, auto.window) if key == "auto.patience" else auto.patience
        raise NpoError(
            f"{key} is {parts[key]}: the first warning could come at step {first} (the larger of auto.warmup "
            f"{auto.warmup} and auto.window {auto.window}, and then auto.patience {auto.patience}), "
            f"and the run has only {num_steps} steps (train.num_steps)",
            f"{key}={max(1, num_steps - rest)} or less",
        )


def refuse_vain(recipe: Recipe) -> None:
    """Guides that would never be let in, a probe that nothing can pass, a V that one side cannot tell."""
    if recipe.pool.tau > recipe.inject.gate:
        raise NpoError(
            f"pool.tau is {recipe.pool.tau:g}, above inject.gate {recipe.inject.gate:g}: "
            "a guide made for such a prompt would never be let in",
            f"pool.tau={recipe.inject.gate:g} or less",
        )
    if recipe.auto.q_min >= 1:
        raise NpoError("auto.q_min is 1: no lower bound of a pass rate reaches that", "auto.q_min=0.1")
    if recipe.rollback.data == "onward":
        raise NpoError(
            "rollback.data is onward: AutoNPO's guides answer the prompts that it goes back over, "
            "and such a replay never meets them",
            "rollback.data=same",
        )
    if recipe.probe.direction == "learner" and recipe.score.variance not in TWO_SIDED:
        raise NpoError(
            f"probe.direction is learner, but score.variance={recipe.score.variance} can only be told from the "
            "guide's samples",
            f"score.variance={TWO_SIDED[-1]}, or probe.direction=guide",
        )


def refuse_endless(recipe: Recipe) -> None:
    """Without a cap, a rest shorter than a replay lets the run go over the same steps for ever."""
    auto, farthest = recipe.auto, usable_deltas(recipe)[-1]
    if auto.max == -1 and auto.cooldown < farthest:
        raise NpoError(
            f"auto.cooldown is {auto.cooldown}, shorter than the longest replay ({farthest}, auto.deltas), and "
            "auto.max sets no limit: the run could go over the same steps for ever",
            f"auto.cooldown={farthest}, or a limit such as auto.max=3",
        )


def refuse_early(recipe: Recipe) -> None:
    """A scout needs a checkpoint at its end, and at the end of the replay where the two are compared."""
    auto = recipe.auto
    if auto.early and recipe.early.scout >= recipe.train.num_steps:
        raise NpoError(
            f"early.scout is {recipe.early.scout}, and the run has only {recipe.train.num_steps} steps "
            "(train.num_steps): the bootstrap would never come",
            f"early.scout={(recipe.train.num_steps - 1) // recipe.train.save_every * recipe.train.save_every} or less",
        )
    if auto.early and recipe.early.window > recipe.early.scout:
        raise NpoError(
            f"early.window is {recipe.early.window}, longer than the scout that answers it "
            f"(early.scout {recipe.early.scout})",
            f"early.window={recipe.early.scout} or less",
        )
    if auto.early and recipe.early.scout % recipe.train.save_every:
        raise NpoError(
            f"early.scout is {recipe.early.scout}, no multiple of train.save_every ({recipe.train.save_every}): "
            "the scout's last step has no checkpoint",
            f"early.scout={recipe.train.save_every}",
        )
    if auto.early and recipe.replay.accept_test and recipe.early.window % recipe.train.save_every:
        raise NpoError(
            f"early.window is {recipe.early.window}, no multiple of train.save_every ({recipe.train.save_every}): "
            "the scout has no checkpoint that the replay could be compared with (replay.accept_test)",
            f"early.window={recipe.early.scout}",
        )
    judged = auto.early and recipe.replay.accept_test
    if judged and recipe.early.window < recipe.early.scout and recipe.train.keep_guides is not None:
        raise NpoError(
            f"early.window is {recipe.early.window} and early.scout {recipe.early.scout}: replay.accept_test needs the "
            "scout as it was in between, which train.keep_guides may have deleted by then",
            f"early.window={recipe.early.scout}",
        )
