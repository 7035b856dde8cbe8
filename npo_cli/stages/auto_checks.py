"""Settings under which AutoNPO could never step in, or never get anywhere: refused before training starts."""

from npo_cli.config import Recipe
from npo_cli.errors import NpoError


def usable_deltas(recipe: Recipe) -> tuple[int, ...]:
    """Rollback distances that end at a checkpoint: multiples of train.save_every."""
    return tuple(delta for delta in recipe.auto.deltas if delta % recipe.train.save_every == 0)


def longest_slice(recipe: Recipe, *, num_prompts: int) -> int:
    """Most distinct prompts that a replay of the largest usable distance can visit."""
    farthest = usable_deltas(recipe)[-1]
    return min(recipe.pool.size, num_prompts, farthest * recipe.train.prompts_per_step)


def refuse_impossible(recipe: Recipe, num_prompts: int) -> None:
    """The key that is wrong, and what would be right."""
    auto, train, usable = recipe.auto, recipe.train, usable_deltas(recipe)
    if not usable:
        raise NpoError(
            f"none of auto.deltas ({', '.join(map(str, auto.deltas))}) is a multiple of train.save_every "
            f"({train.save_every}): no checkpoint to go back to",
            f"auto.deltas=[{train.save_every},{2 * train.save_every}], or a smaller train.save_every",
        )
    if train.keep_anchors is not None and train.keep_anchors * train.save_every < usable[-1]:
        needed = -(-usable[-1] // train.save_every)
        raise NpoError(
            f"train.keep_anchors is {train.keep_anchors}: a rollback by {usable[-1]} steps (auto.deltas) needs "
            f"{needed} full states {train.save_every} steps apart, older ones keep their weights only",
            f"train.keep_anchors={needed}, or smaller auto.deltas",
        )
    if usable[0] >= train.num_steps:
        raise NpoError(
            f"auto.deltas begin at {usable[0]}, and the run has only {train.num_steps} steps (train.num_steps)",
            "smaller auto.deltas and train.save_every, or more train.num_steps",
        )
    if recipe.pool.tau > recipe.inject.gate:
        raise NpoError(
            f"pool.tau is {recipe.pool.tau:g}, above inject.gate {recipe.inject.gate:g}: "
            "a guide made for such a prompt would never be let in",
            f"pool.tau={recipe.inject.gate:g} or less",
        )
    refuse_endless(recipe)
    refuse_early(recipe)
    most = longest_slice(recipe, num_prompts=num_prompts)
    for key, wanted in (("probe.prompts", recipe.probe.prompts), ("auto.pool_min", auto.pool_min)):
        if wanted > most:
            raise NpoError(
                f"{key} is {wanted}, but at most {most} prompts can have failed in {usable[-1]} steps "
                f"(pool.size {recipe.pool.size}, {num_prompts} training prompts, {train.prompts_per_step} a step)",
                f"{key}={most} or less",
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
