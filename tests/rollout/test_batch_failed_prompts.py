"""The pool of failed prompts."""

from dataclasses import replace

import pytest

from npo_cli.autonpo.rollback_choice import stratify_failed_prompts
from npo_cli.rollout.batch import collect_failed_prompts, update_failed_prompt_pool
from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.rollouts import Group
from tests.rollout.test_mixing import group_of, mix


def failed(prompt_id: str, step: int, accuracy: float = 0.0) -> FailedPrompt:
    return FailedPrompt(prompt_id=prompt_id, step=step, accuracy=accuracy, epoch=0)


def test_failed_prompt_pool_collects_groups_up_to_the_limit():
    groups = [
        group_of(True, False, False, False, prompt_id="quarter"),
        group_of(True, True, False, False, prompt_id="half"),
        group_of(False, False, False, False, prompt_id="none"),
    ]
    assert collect_failed_prompts(groups, step=7, epochs=[0, 0, 2], limit=0.25) == (
        FailedPrompt(prompt_id="quarter", step=7, accuracy=0.25, epoch=0),
        FailedPrompt(prompt_id="none", step=7, accuracy=0.0, epoch=2),
    )


def test_failed_prompt_pool_ignores_injected_rollouts():
    # 1 of 4 slots is correct, but it is injected: 0 of 3 on-policy rollouts
    (mixed,) = mix([group_of(False, False, False, False)])
    (failure,) = collect_failed_prompts([mixed], step=1, epochs=[0], limit=0.0)
    assert failure.accuracy == 0.0


def test_failed_prompt_pool_needs_verified_groups():
    group: Group = group_of(False)
    raw = replace(group, rollouts=(replace(group.rollouts[0], verdict=None),))
    with pytest.raises(AssertionError):
        collect_failed_prompts([raw], step=1, epochs=[0], limit=0.5)


def test_failed_prompt_pool_drops_the_oldest_first():
    before = (failed("a", 1), failed("b", 2), failed("c", 2))
    assert update_failed_prompt_pool(before, [failed("d", 3)], size=3) == (
        failed("b", 2),
        failed("c", 2),
        failed("d", 3),
    )
    # the step decides, not the order of arrival
    assert update_failed_prompt_pool([failed("late", 9)], [failed("old", 1)], size=1) == (failed("late", 9),)
    assert update_failed_prompt_pool(before, [], size=10) == before


def test_failed_prompt_pool_grows_with_prompts_and_not_with_steps():
    pool = ()
    for step in range(1, 301):
        accuracy = 0.25 * (step % 2)
        pool = update_failed_prompt_pool(pool, [failed(f"p{step % 5}", step, accuracy)], size=1000)
    # The newest failure of each prompt and accuracy: of the last ten steps.
    assert [failure.step for failure in pool] == list(range(291, 301))
    settings = {"step": 300, "distances": [4, 8, 12]}
    every = [failed(f"p{step % 5}", step, 0.25 * (step % 2)) for step in range(1, 301)]
    for limit in (0.0, 0.25):
        assert stratify_failed_prompts(pool, max_accuracy=limit, **settings) == stratify_failed_prompts(
            every, max_accuracy=limit, **settings
        )
