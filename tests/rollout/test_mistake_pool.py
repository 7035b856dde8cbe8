from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.rollout.mistake_pool import (
    Stratum,
    allocate_probe_prompts,
    collect_failed_prompts,
    stratify_failed_prompts,
    update_failed_prompt_pool,
)
from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.rollouts import Group
from tests.rollout.test_mixing import group_of, mix


def failed(prompt_id: str, step: int, accuracy: float = 0.0) -> FailedPrompt:
    return FailedPrompt(prompt_id=prompt_id, step=step, accuracy=accuracy, epoch=0)


def strata_sized(*sizes: int) -> tuple[Stratum, ...]:
    """Strata of ages 0-9, 10-19, ...; prompts are 0-000, 0-001, ..., 1-000, ..."""
    return tuple(
        Stratum(min_age=10 * j, max_age=10 * j + 10, prompt_ids=tuple(f"{j}-{i:03}" for i in range(size)))
        for j, size in enumerate(sizes)
    )


def counts(chosen) -> list[int]:
    return [len(prompt_ids) for prompt_ids in chosen]


# The pool


def test_a_group_of_at_most_the_limit_is_a_mistake():
    groups = [
        group_of(True, False, False, False, prompt_id="quarter"),
        group_of(True, True, False, False, prompt_id="half"),
        group_of(False, False, False, False, prompt_id="none"),
    ]
    assert collect_failed_prompts(groups, step=7, epochs=[0, 0, 2], limit=0.25) == (
        FailedPrompt(prompt_id="quarter", step=7, accuracy=0.25, epoch=0),
        FailedPrompt(prompt_id="none", step=7, accuracy=0.0, epoch=2),
    )


def test_a_seated_guide_does_not_hide_a_failure():
    # 1 of 4 slots is correct, but it is the guide's: 0 of 3 of the policy's own
    (mixed,) = mix([group_of(False, False, False, False)])
    (mistake,) = collect_failed_prompts([mixed], step=1, epochs=[0], limit=0.0)
    assert mistake.accuracy == 0.0


def test_an_unverified_group_is_our_own_mistake():
    group: Group = group_of(False)
    raw = replace(group, rollouts=(replace(group.rollouts[0], verdict=None),))
    with pytest.raises(AssertionError):
        collect_failed_prompts([raw], step=1, epochs=[0], limit=0.5)


def test_the_pool_forgets_the_oldest_first():
    before = (failed("a", 1), failed("b", 2), failed("c", 2))
    assert update_failed_prompt_pool(before, [failed("d", 3)], size=3) == (
        failed("b", 2),
        failed("c", 2),
        failed("d", 3),
    )
    # age, not the order of arrival, decides who leaves
    assert update_failed_prompt_pool([failed("late", 9)], [failed("old", 1)], size=1) == (failed("late", 9),)
    assert update_failed_prompt_pool(before, [], size=10) == before


# Strata


def test_an_age_of_less_than_the_distance_is_undone_by_it():
    # at step 50, distance 10 does steps 41 ... 50 again: ages 9 ... 0; age 10 (step 40) is of the next stratum
    near, far = stratify_failed_prompts(
        [failed("oldest", 31), failed("edge", 40), failed("inside", 41), failed("now", 50)],
        step=50,
        distances=[10, 20],
        max_accuracy=0.0,
    )
    assert (near.min_age, near.max_age, near.prompt_ids) == (0, 10, ("now", "inside"))
    assert (far.min_age, far.max_age, far.prompt_ids) == (10, 20, ("edge", "oldest"))


def test_the_newest_failure_decides_the_age():
    mistakes = [failed("x", 35), failed("x", 48), failed("y", 35)]
    for order in (mistakes, mistakes[::-1]):
        near, far = stratify_failed_prompts(order, step=50, distances=[10, 20], max_accuracy=0.0)
        assert (near.prompt_ids, far.prompt_ids) == (("x",), ("y",))


def test_a_milder_failure_does_not_make_an_older_one_newer():
    # accuracy 0.5 at step 48 is above tau, so the failure of step 35 counts
    near, far = stratify_failed_prompts(
        [failed("x", 35), failed("x", 48, 0.5)], step=50, distances=[10, 20], max_accuracy=0.25
    )
    assert (near.prompt_ids, far.prompt_ids) == ((), ("x",))


def test_failures_out_of_reach_are_left_out():
    # 30 is 20 steps old; step 51 has not happened on this branch yet
    strata = stratify_failed_prompts(
        [failed("old", 30), failed("later", 51)], step=50, distances=[10, 20], max_accuracy=0.0
    )
    assert [stratum.prompt_ids for stratum in strata] == [(), ()]
    # and does not hide a failure that has
    near, _ = stratify_failed_prompts([failed("x", 45), failed("x", 51)], step=50, distances=[10, 20], max_accuracy=0.0)
    assert near.prompt_ids == ("x",)


def test_strata_come_by_distance_and_prompts_by_age_then_place():
    mistakes = [failed("b", 44), failed("a", 44), failed("c", 49)]
    near, far = stratify_failed_prompts(mistakes, step=50, distances=[20, 10], max_accuracy=0.0)
    assert (near.max_age, far.max_age) == (10, 20)
    assert near.prompt_ids == ("c", "b", "a")


# The allotment


def test_prompts_are_asked_by_the_size_of_their_strata():
    # of 20: 12, 6, 2 by size; the last is raised to 4, and 16 are left for 60 to 30: 10.7 and 5.3
    assert counts(allocate_probe_prompts(strata_sized(60, 30, 10), num_prompts=20, seed=0)) == [11, 5, 4]
    # of 100: nobody is below a few
    assert counts(allocate_probe_prompts(strata_sized(600, 300, 100), num_prompts=100, seed=0)) == [60, 30, 10]


def test_a_few_of_every_stratum_are_asked_as_long_as_there_are_any():
    # at least 4, or the 2 there are; 14 of 20 are left for the large one
    assert counts(allocate_probe_prompts(strata_sized(1000, 2, 5, 0), num_prompts=20, seed=0)) == [14, 2, 4, 0]


def test_where_all_mistakes_fit_all_are_asked():
    strata = strata_sized(5, 0, 3)
    asked = allocate_probe_prompts(strata, num_prompts=8, seed=0)
    assert [set(each) for each in asked] == [set(stratum.prompt_ids) for stratum in strata]


def test_tiny_budgets_and_empty_pools_are_no_trouble():
    assert allocate_probe_prompts((), num_prompts=10, seed=0) == ()
    assert allocate_probe_prompts(strata_sized(0, 0), num_prompts=10, seed=0) == ((), ())
    assert counts(allocate_probe_prompts(strata_sized(100, 100), num_prompts=3, seed=0)) == [2, 1]


@given(sizes=st.lists(st.integers(0, 60), max_size=6), num_prompts=st.integers(1, 150), seed=st.integers(0, 5))
def test_no_prompt_is_asked_twice_and_the_budget_is_spent_exactly(sizes, num_prompts, seed):
    strata = strata_sized(*sizes)
    chosen = allocate_probe_prompts(strata, num_prompts=num_prompts, seed=seed)
    asked = [prompt_id for of_stratum in chosen for prompt_id in of_stratum]
    assert max(Counter(asked).values(), default=1) == 1
    assert len(asked) == min(num_prompts, sum(sizes))
    assert all(set(ids) <= set(stratum.prompt_ids) for ids, stratum in zip(chosen, strata, strict=True))


def test_the_choice_depends_on_the_seed_alone():
    strata = strata_sized(200)
    (one,) = allocate_probe_prompts(strata, num_prompts=20, seed=1)
    assert (one,) == allocate_probe_prompts(strata, num_prompts=20, seed=1)
    # another order of the same prompts changes nothing; another seed does
    turned = (replace(strata[0], prompt_ids=strata[0].prompt_ids[::-1]),)
    assert (one,) == allocate_probe_prompts(turned, num_prompts=20, seed=1)
    assert (one,) != allocate_probe_prompts(strata, num_prompts=20, seed=2)


def test_every_prompt_of_a_stratum_is_as_likely_to_be_asked():
    # 20 of 100 over 400 seeds: each about 80 times, sd sqrt(400 * .2 * .8) = 8; 5 sd is 40
    strata = strata_sized(100)
    asked = Counter(
        prompt_id for seed in range(400) for prompt_id in allocate_probe_prompts(strata, num_prompts=20, seed=seed)[0]
    )
    assert len(asked) == 100
    assert all(40 < times < 120 for times in asked.values())
