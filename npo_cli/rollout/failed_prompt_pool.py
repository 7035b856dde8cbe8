"""The pool of failed prompts: which prompts the policy failed, and when. Pure: verdicts and ids."""

from collections.abc import Sequence

from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.rollouts import Group


def collect_failed_prompts(
    groups: Sequence[Group], *, step: int, epochs: Sequence[int], limit: float
) -> tuple[FailedPrompt, ...]:
    """Prompts of which at most `limit` of the on-policy rollouts were correct; injected rollouts do not count."""
    return tuple(
        FailedPrompt(prompt_id=group.prompt.prompt_id, step=step, accuracy=accuracy, epoch=epoch)
        for group, epoch in zip(groups, epochs, strict=True)
        for accuracy in [group.on_policy.accuracy]
        if accuracy <= limit
    )


def update_failed_prompt_pool(
    before: Sequence[FailedPrompt], new: Sequence[FailedPrompt], *, size: int
) -> tuple[FailedPrompt, ...]:
    """The newest `size` failures, oldest first; within one step the last ones are kept."""
    return tuple(sorted((*before, *new), key=lambda failure: failure.step)[-size:])
