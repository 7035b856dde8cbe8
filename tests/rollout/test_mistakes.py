"""Which standing mistakes come first: chance of a partly solved group, older visits, draw, metrics, settings."""

from collections import Counter
from collections.abc import Sequence

import pytest
from scipy import stats

from npo_cli.config.order import OrderSettings
from npo_cli.errors import NpoError
from npo_cli.rollout.mistakes import StandingMistakes, compute_partly_solved_chance
from npo_cli.types.rollouts import GroupOutcome
from tests.helpers.groups import group
from tests.helpers.runs import tiny_recipe


def open_mistakes(
    *seen: tuple[str, int], size: int = 8, threshold: float = 0.5, **settings: object
) -> StandingMistakes:
    """Groups of `size` rollouts in order, as (prompt id, number correct)."""
    outcomes = [
        GroupOutcome(prompt_id=prompt_id, step=step, num_rollouts=size, num_correct=correct, has_guide=False)
        for step, (prompt_id, correct) in enumerate(seen, start=1)
    ]
    order = OrderSettings(**({"mistakes": 0.5} | settings))
    return StandingMistakes(order, threshold=threshold, fork_step=10, outcomes=outcomes)


def draw_ids(mistakes: StandingMistakes, count: int, seed: int = 0, exclude: Sequence[str] = ()) -> list[str]:
    return list(mistakes.draw(count, group_size=8, seed=seed, exclude=exclude).prompt_ids)


@pytest.mark.parametrize(("correct", "wrong", "size"), [(0, 0, 8), (0, 8, 8), (2, 6, 8), (3.5, 12.5, 4), (0, 0, 2)])
def test_partly_solved_chance_is_that_of_a_beta_binomial(correct, wrong, size):
    counts = stats.betabinom(size, 1 + correct, 1 + wrong)
    expected = 1 - counts.pmf(0) - counts.pmf(size)
    assert compute_partly_solved_chance(correct, wrong, group_size=size) == pytest.approx(expected)


def test_partly_solved_chance_without_a_visit_and_after_eight_wrong():
    # Every number of correct rollouts from 0 to 8 is equally likely: 7 of 9 are partly solved.
    assert compute_partly_solved_chance(0, 0, group_size=8) == pytest.approx(7 / 9)
    # Beta(1, 9): E[(1 - q)^8] = 9 / 17, E[q^8] = 8! 9! / 17! = 1 / 24310
    assert compute_partly_solved_chance(0, 8, group_size=8) == pytest.approx(1 - 9 / 17 - 1 / 24310)


def test_older_visits_count_less():
    mistakes = open_mistakes(("a", 4), ("a", 0), ("a", 2), visit_decay=0.5)
    # correct 2 + .5 (0 + .5 * 4) = 3, wrong 6 + .5 (8 + .5 * 4) = 11
    assert mistakes.compute_chances(8)["a"] == pytest.approx(compute_partly_solved_chance(3, 11, group_size=8))
    newest = open_mistakes(("a", 4), ("a", 0), ("a", 2), visit_decay=0.0)
    assert newest.compute_chances(8)["a"] == pytest.approx(compute_partly_solved_chance(2, 6, group_size=8))


def test_mistake_stands_while_the_newest_group_is_at_or_below_the_threshold():
    mistakes = open_mistakes(("at", 4), ("above", 5), ("cured", 0), ("cured", 8), ("forgotten", 8), ("forgotten", 1))
    assert set(draw_ids(mistakes, 9)) == {"at", "forgotten"}
    mistakes.add_groups(7, [group("above", 0), group("at", 8)], None)
    assert set(draw_ids(mistakes, 9)) == {"above", "forgotten"}


def test_draw_is_proportional_to_the_chance_of_a_partly_solved_group():
    """2000 single draws; 4 standard deviations."""
    mistakes = open_mistakes(("half", 4), ("rare", 0), ("never", 0), ("never", 0), ("never", 0), visit_decay=0.9)
    chances = mistakes.compute_chances(8)
    found = Counter(draw_ids(mistakes, 1, seed)[0] for seed in range(2000))
    for name, chance in chances.items():
        expected = chance / sum(chances.values())
        assert found[name] / 2000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)
    assert chances["half"] > chances["rare"] > chances["never"] > 0


def test_draw_is_without_replacement_and_a_function_of_the_seed():
    mistakes = open_mistakes(*((f"p{index}", 1) for index in range(20)))
    drawn = draw_ids(mistakes, 6, seed=3)
    assert len(set(drawn)) == 6
    assert drawn == draw_ids(mistakes, 6, seed=3) != draw_ids(mistakes, 6, seed=4)
    # What is excluded leaves the order of the others alone.
    assert draw_ids(mistakes, 5, seed=3, exclude=drawn[:1]) == drawn[1:]
    assert len(draw_ids(mistakes, 50)) == 20


def test_window_begins_at_the_fork_or_after_start_step():
    mistakes = open_mistakes(num_steps=2)
    assert [mistakes.count_to_draw(step, num_prompts=16) for step in (10, 11, 12, 13)] == [0, 8, 8, 0]
    later = open_mistakes(start_step=12, mistakes=0.3)
    assert [later.count_to_draw(step, num_prompts=16) for step in (12, 13, 99)] == [0, 5, 5]


def test_metrics_hold_forecast_and_found_partly_solved_groups():
    mistakes = open_mistakes(("a", 0), ("b", 4), ("standing", 0), ("solved", 8))
    draw = mistakes.draw(2, group_size=8, seed=0, exclude={"standing"})
    forecast = mistakes.compute_chances(8)["a"] + mistakes.compute_chances(8)["b"]
    assert mistakes.add_groups(5, [group("a", 0), group("b", 3), group("fresh", 3)], draw) == {
        "order/standing": 3,
        "order/mistakes": 2,
        "order/partly_solved_forecast": pytest.approx(forecast),
        "order/partly_solved": 1,
    }
    none = open_mistakes(("solved", 8)).draw(2, group_size=8, seed=0, exclude=())
    assert mistakes.add_groups(6, [], none) == {"order/standing": 0, "order/mistakes": 0}
    assert mistakes.add_groups(7, [group("a", 0)], None) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["order.mistakes=0.5", "sampling.dynamic=true"], "not available with sampling.dynamic=true"),
        (["order.mistakes=0.5", "guide.experience.replay_fraction=0.5"], "with guide.experience.replay_fraction"),
        (["order.threshold=0.5"], "order.threshold has no effect without order.mistakes"),
        (["order.mistakes=2"], "order.mistakes"),
    ],
    ids=str,
)
def test_order_settings_are_refused(overrides, message):
    with pytest.raises(NpoError) as caught:
        tiny_recipe(*overrides)
    assert message in caught.value.message
