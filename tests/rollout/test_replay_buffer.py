import math
from collections import Counter

import pytest

from npo_cli.config.guides import ExperienceSettings
from npo_cli.rollout.replay_buffer import (
    add_successes,
    bucket_probabilities,
    buffer_metrics,
    sample_replay_prompts,
    start_collecting,
)
from npo_cli.types.guides import ReplayBuffer, Success
from npo_cli.types.rollouts import Group
from tests.rollout.test_mixing import group_of

COUNTS = ExperienceSettings(bucket_units="count", bucket_sigma=1.0)


def success(text: str, step: int = 3) -> Success:
    return Success(response_ids=(5, 2), behavior_logps=(-0.1, -0.2), text=text, step=step, reward=1.0)


def group(prompt_id: str, num_correct: int) -> Group:
    """Eight rollouts, so many of them correct."""
    return group_of(*[True] * num_correct, *[False] * (8 - num_correct), prompt_id=prompt_id)


def add(
    buffer: ReplayBuffer, groups: list[Group], *texts: str, epoch: int = 0, retire: bool = True, most: int = 64
) -> ReplayBuffer:
    """With new successes of these texts for every prompt."""
    new = {each.prompt.prompt_id: tuple(map(success, texts)) for each in groups}
    return add_successes(buffer, groups, new, epoch=epoch, retire=retire, most=most)


def memory_of(**num_correct: int) -> ReplayBuffer:
    successes = {name: (success("1"),) for name in num_correct}
    return ReplayBuffer(is_collecting=True, successes=successes, num_correct=num_correct)


def test_replay_buffer_starts_collecting_at_an_accuracy_and_never_stops():
    empty = ReplayBuffer()
    assert add(empty, [group("a", 4)], "1") == empty
    assert not start_collecting(empty, 0.35, start=0.35).is_collecting
    begun = start_collecting(empty, 0.36, start=0.35)
    assert begun.is_collecting
    assert start_collecting(begun, 0.0, start=0.35).is_collecting


def test_replay_buffer_keeps_each_response_once_and_the_newest_count():
    first = add(ReplayBuffer(is_collecting=True), [group("a", 3)], "x", "y", "x")
    assert [kept.text for kept in first.successes["a"]] == ["x", "y"]
    again = add(first, [group("a", 5)], "y", "z")
    assert [kept.text for kept in again.successes["a"]] == ["x", "y", "z"]
    assert again.num_correct == {"a": 5}


def test_replay_buffer_retires_solved_prompts():
    known = memory_of(a=4, b=2)
    after = add(known, [group("a", 8), group("b", 0)], "x", epoch=1)
    assert (set(after.successes), dict(after.num_correct), dict(after.retired_epochs)) == ({"b"}, {"b": 2}, {"a": 1})
    kept = add(known, [group("a", 8)], "x", retire=False)
    assert kept == known


def test_replay_bucket_probabilities_are_gaussian_around_half_correct():
    # e^-(k-4)^2/2 at |k - 4| = 0..3: 1, .6065, .1353, .0111
    shares = bucket_probabilities({4, 5, 6, 7}, COUNTS, group_size=8)
    total = 1 + 0.60653 + 0.13534 + 0.01111
    assert [shares[k] * total for k in (4, 5, 6, 7)] == pytest.approx([1, 0.60653, 0.13534, 0.01111], abs=1e-4)
    flat = bucket_probabilities({4, 7}, ExperienceSettings(bucket_units="rate", bucket_sigma=1.0), group_size=8)
    # (7/8 - 1/2)^2 / 2 = .0703: e^-.0703 = .932
    assert flat[7] / flat[4] == pytest.approx(math.exp(-0.0703125))


def test_replay_bucket_probability_does_not_depend_on_its_size():
    memory = memory_of(**{f"a{i}": 4 for i in range(30)}, b=5)
    drawn = Counter(sample_replay_prompts(memory, 1, COUNTS, group_size=8, seed=seed)[0][0] for seed in range(600))
    # b: .60653 / 1.60653 = .378 of the draws
    assert drawn["b"] / 600 == pytest.approx(0.378, abs=0.06)


def test_replay_prompts_are_drawn_without_replacement():
    memory = memory_of(a=4, b=4, c=7)
    for seed in range(20):
        assert sorted(sample_replay_prompts(memory, 3, COUNTS, group_size=8, seed=seed)) == ["a", "b", "c"]
    assert sorted(sample_replay_prompts(memory, 9, COUNTS, group_size=8, seed=0)) == ["a", "b", "c"]
    assert "a" not in sample_replay_prompts(memory, 2, COUNTS, group_size=8, seed=0, exclude={"a"})
    assert sample_replay_prompts(ReplayBuffer(), 2, COUNTS, group_size=8, seed=0) == []


def test_replay_buffer_metrics():
    memory = add(memory_of(a=4, b=4), [group("b", 3), group("c", 8)], "2")
    assert buffer_metrics(memory) == {"experience/prompts": 2.0, "experience/responses": 3.0, "experience/retired": 1.0}


def test_buffer_keeps_the_newest_responses_of_a_prompt():
    buffer = ReplayBuffer(is_collecting=True)
    for number in range(9):
        buffer = add(buffer, [group("a", 3)], f"{number}", most=3)
    assert [each.text for each in buffer.successes["a"]] == ["6", "7", "8"]
    assert buffer == add(buffer, [group("a", 3)], "7", most=3)  # a text that is there is not newer
