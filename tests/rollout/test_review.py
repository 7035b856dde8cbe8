"""The review queue, worked out by hand: schedule, head and tail, graduation, capacity, enqueue draw, settings."""

import pytest

from npo_cli.config.order import ReviewSettings
from npo_cli.errors import NpoError
from npo_cli.rollout.review import ReviewQueue
from npo_cli.rollout.revisits import RevisitDraw
from npo_cli.types.rollouts import GroupOutcome
from tests.helpers.groups import group
from tests.helpers.runs import tiny_recipe

SOLVED, MIXED = 8, 7
"""Correct ones of 8 rollouts."""


def open_queue(*solved: str, probability: float = 1.0, seed: int = 0, **settings: object) -> ReviewQueue:
    """With the groups of these prompts, all correct, on record, one per step."""
    outcomes = [
        GroupOutcome(prompt_id=prompt_id, step=step, num_rollouts=8, num_correct=8, has_guide=False)
        for step, prompt_id in enumerate(solved, start=1)
    ]
    review = ReviewSettings(**({"fraction": 0.5, "enqueue_probability": probability} | settings))
    return ReviewQueue(review, seed=seed, outcomes=outcomes)


def add(queue: ReviewQueue, *groups: tuple[str, int], draw: RevisitDraw | None = None) -> dict[str, float]:
    return queue.add_groups(50, [group(*each) for each in groups], draw)


def draw_reviews(queue: ReviewQueue, count: int, *exclude: str) -> RevisitDraw:
    return queue.draw(count, group_size=8, seed=0, exclude=exclude)


def test_review_is_in_every_fifth_step_from_the_fiftieth_on():
    queue = open_queue(fraction=0.1)
    counts = {step: queue.count_to_draw(step, num_prompts=256) for step in (5, 45, 49, 50, 51, 55)}
    # floor(25.6)
    assert counts == {5: 0, 45: 0, 49: 0, 50: 25, 51: 0, 55: 25}
    assert queue.count_to_draw(50, num_prompts=4) == 1, "a small batch reviews one prompt"
    assert open_queue(fraction=0).count_to_draw(50, num_prompts=256) == 0


def test_review_draws_the_head_and_leaves_the_queue_until_the_groups_are_known():
    queue = open_queue("a", "b", "c", "d")
    assert draw_reviews(queue, 2).prompt_ids == ("a", "b")
    assert draw_reviews(queue, 2, "a", "c").prompt_ids == ("b", "d"), "a and c are in the batch already"
    assert draw_reviews(queue, 9).prompt_ids == ("a", "b", "c", "d")
    assert queue.prompt_ids == ("a", "b", "c", "d")


def test_reviewed_prompt_graduates_or_returns_to_the_tail_before_new_ones():
    queue = open_queue("a", "b", "c")
    metrics = add(queue, ("new", SOLVED), ("hard", MIXED), ("a", SOLVED), ("b", MIXED), draw=draw_reviews(queue, 2))
    assert queue.prompt_ids == ("c", "b", "new")
    assert metrics == {
        "order/queue_size": 3,
        "order/enqueued": 1,
        "order/reviewed": 2,
        "order/graduated": 1,
        "order/regressed": 1,
    }
    assert add(queue, ("a", SOLVED)) == {"order/queue_size": 4, "order/enqueued": 1}, "solved again in a later epoch"


def test_regressed_prompts_keep_their_order():
    queue = open_queue("a", "b", "c", "d")
    add(queue, ("a", MIXED), ("b", 0), ("c", MIXED), draw=draw_reviews(queue, 3))
    assert queue.prompt_ids == ("d", "a", "b", "c")


def test_queued_prompt_of_the_data_order_counts_as_reviewed():
    """It is not in the queue twice, and one that graduates does not enter again in the same step."""
    queue = open_queue("a", "b", "c")
    assert add(queue, ("a", MIXED), ("b", SOLVED)) == {"order/queue_size": 2, "order/enqueued": 0}
    assert queue.prompt_ids == ("c", "a")
    # A small pool wraps inside a step: both groups of c must be all correct.
    add(queue, ("c", MIXED), ("c", SOLVED))
    assert queue.prompt_ids == ("a", "c")


def test_oldest_prompts_leave_a_full_queue():
    queue = open_queue("a", "b", "c", max_size=2)
    assert queue.prompt_ids == ("b", "c")
    add(queue, ("b", MIXED), ("x", SOLVED), ("y", SOLVED))
    assert queue.prompt_ids == ("x", "y"), "c, b, x, y"


def test_enqueue_probability_is_that_of_a_draw_by_seed_step_and_prompt():
    names = [f"p{index}" for index in range(2000)]
    assert open_queue(*names, probability=0.0).prompt_ids == ()
    quarter = open_queue(*names, probability=0.25).prompt_ids
    # 4 standard deviations
    assert len(quarter) / 2000 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert quarter == open_queue(*names, probability=0.25).prompt_ids
    assert quarter != open_queue(*names, probability=0.25, seed=1).prompt_ids
    assert quarter != open_queue("first", *names, probability=0.25).prompt_ids, "one step later"


def test_queue_of_a_record_is_that_of_the_same_groups_one_step_after_the_other():
    live = open_queue(probability=0.5)
    seen = [(step, f"p{step % 7}", SOLVED if step % 3 else MIXED) for step in range(1, 60)]
    for step, name, correct in seen:
        live.add_groups(step, [group(name, correct)], None)
    outcomes = [
        GroupOutcome(prompt_id=name, step=step, num_rollouts=8, num_correct=correct, has_guide=False)
        for step, name, correct in seen
    ]
    assert ReviewQueue(live.settings, seed=0, outcomes=outcomes).prompt_ids == live.prompt_ids != ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["order.review.fraction=0.5", "sampling.dynamic=true"], "order.review.fraction=0.5 is not available with"),
        (["order.review.fraction=0.5", "guide.experience.replay_fraction=0.5"], "with guide.experience"),
        (["order.review.fraction=0.5", "order.mistakes=0.5"], "both take the end of the batch"),
        (["order.review.fraction=0.5", "train.objective=sft"], "not available with order.review.fraction"),
        (["order.review.every=2"], "order.review.every has no effect without order.review.fraction"),
        (["order.review.fraction=0.5", "order.review.every=0"], "order.review.every"),
    ],
    ids=str,
)
def test_review_settings_are_refused(overrides, message):
    with pytest.raises(NpoError) as caught:
        tiny_recipe(*overrides)
    assert message in caught.value.message
