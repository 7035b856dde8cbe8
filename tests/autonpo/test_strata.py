"""Strata of failed prompts by age, and the allocation of a probe to them."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from npo_cli.autonpo.rollback_choice import Stratum, allocate_probe_prompts, stratify_failed_prompts
from npo_cli.types.autonpo import FailedPrompt


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


# Strata


def test_stratum_contains_ages_below_its_distance():
    # at step 50, distance 10 repeats steps 41 ... 50: ages 9 ... 0; age 10 (step 40) is of the next stratum
    near, far = stratify_failed_prompts(
        [failed("oldest", 31), failed("edge", 40), failed("inside", 41), failed("now", 50)],
        step=50,
        distances=[10, 20],
        max_accuracy=0.0,
    )
    assert (near.min_age, near.max_age, near.prompt_ids) == (0, 10, ("now", "inside"))
    assert (far.min_age, far.max_age, far.prompt_ids) == (10, 20, ("edge", "oldest"))


def test_stratum_of_a_prompt_is_that_of_its_newest_failure():
    failures = [failed("x", 35), failed("x", 48), failed("y", 35)]
    for order in (failures, failures[::-1]):
        near, far = stratify_failed_prompts(order, step=50, distances=[10, 20], max_accuracy=0.0)
        assert (near.prompt_ids, far.prompt_ids) == (("x",), ("y",))


def test_stratum_ignores_failures_above_max_accuracy():
    # accuracy 0.5 at step 48 is above max_accuracy, so the failure of step 35 counts
    near, far = stratify_failed_prompts(
        [failed("x", 35), failed("x", 48, 0.5)], step=50, distances=[10, 20], max_accuracy=0.25
    )
    assert (near.prompt_ids, far.prompt_ids) == ((), ("x",))


def test_strata_leave_out_later_and_too_old_failures():
    # 30 is 20 steps old; step 51 has not happened on this branch yet
    strata = stratify_failed_prompts(
        [failed("old", 30), failed("later", 51)], step=50, distances=[10, 20], max_accuracy=0.0
    )
    assert [stratum.prompt_ids for stratum in strata] == [(), ()]
    # and does not hide a failure that has
    near, _ = stratify_failed_prompts([failed("x", 45), failed("x", 51)], step=50, distances=[10, 20], max_accuracy=0.0)
    assert near.prompt_ids == ("x",)


def test_strata_are_ordered_by_distance_and_prompts_by_age():
    failures = [failed("b", 44), failed("a", 44), failed("c", 49)]
    near, far = stratify_failed_prompts(failures, step=50, distances=[20, 10], max_accuracy=0.0)
    assert (near.max_age, far.max_age) == (10, 20)
    assert near.prompt_ids == ("c", "b", "a")


# Allocation


def test_probe_allocation_is_proportional_to_stratum_size():
    # of 20: 12, 6, 2 by size; the last is raised to 4, and 16 are left for 60 to 30: 10.7 and 5.3
    assert counts(allocate_probe_prompts(strata_sized(60, 30, 10), num_prompts=20, seed=0)) == [11, 5, 4]
    # of 100: none is below 4
    assert counts(allocate_probe_prompts(strata_sized(600, 300, 100), num_prompts=100, seed=0)) == [60, 30, 10]


def test_probe_allocation_takes_a_few_of_every_stratum():
    # at least 4, or the 2 there are; 14 of 20 are left for the large one
    assert counts(allocate_probe_prompts(strata_sized(1000, 2, 5, 0), num_prompts=20, seed=0)) == [14, 2, 4, 0]


def test_probe_allocation_takes_all_prompts_if_they_fit():
    strata = strata_sized(5, 0, 3)
    chosen = allocate_probe_prompts(strata, num_prompts=8, seed=0)
    assert [set(each) for each in chosen] == [set(stratum.prompt_ids) for stratum in strata]


def test_probe_allocation_of_tiny_budgets_and_empty_strata():
    assert allocate_probe_prompts((), num_prompts=10, seed=0) == ()
    assert allocate_probe_prompts(strata_sized(0, 0), num_prompts=10, seed=0) == ((), ())
    assert counts(allocate_probe_prompts(strata_sized(100, 100), num_prompts=3, seed=0)) == [2, 1]


@given(sizes=st.lists(st.integers(0, 60), max_size=6), num_prompts=st.integers(1, 150), seed=st.integers(0, 5))
def test_probe_allocation_spends_the_budget_without_duplicates(sizes, num_prompts, seed):
    strata = strata_sized(*sizes)
    chosen = allocate_probe_prompts(strata, num_prompts=num_prompts, seed=seed)
    prompt_ids = [prompt_id for of_stratum in chosen for prompt_id in of_stratum]
    assert max(Counter(prompt_ids).values(), default=1) == 1
    assert len(prompt_ids) == min(num_prompts, sum(sizes))
    assert all(set(ids) <= set(stratum.prompt_ids) for ids, stratum in zip(chosen, strata, strict=True))


def test_probe_allocation_depends_on_the_seed_alone():
    strata = strata_sized(200)
    (one,) = allocate_probe_prompts(strata, num_prompts=20, seed=1)
    assert (one,) == allocate_probe_prompts(strata, num_prompts=20, seed=1)
    # another order of the same prompts changes nothing; another seed does
    turned = (replace(strata[0], prompt_ids=strata[0].prompt_ids[::-1]),)
    assert (one,) == allocate_probe_prompts(turned, num_prompts=20, seed=1)
    assert (one,) != allocate_probe_prompts(strata, num_prompts=20, seed=2)


def test_probe_allocation_is_uniform_within_a_stratum():
    # 20 of 100 over 400 seeds: each about 80 times, sd sqrt(400 * .2 * .8) = 8; 5 sd is 40
    strata = strata_sized(100)
    chosen = Counter(
        prompt_id for seed in range(400) for prompt_id in allocate_probe_prompts(strata, num_prompts=20, seed=seed)[0]
    )
    assert len(chosen) == 100
    assert all(40 < times < 120 for times in chosen.values())
