"""Which push is chosen, and when nobody is asked."""

import math

import pytest

from npo_cli.extrapolation.choice import PushTrial, best_of, choice_of, lower_net, row_of
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.types.guides import ExtrapolationSpec

STANDING = ExtrapolationSpec(space="logits", k=20, a=2.0)


def outcomes(*num_correct: int) -> list[PromptPassCount]:
    return [PromptPassCount(prompt_id=str(p), num_samples=2, num_correct=c) for p, c in enumerate(num_correct)]


def trial(a: float, *, signal: float, low: float = 0.1, kl: float = 1.0) -> PushTrial:
    push = ExtrapolationSpec(space="logits", k=20, a=a)
    return PushTrial(push=push, quality_net=0.2, quality_net_low=low, signal=signal, kl_per_sequence=kl)


def test_the_lower_end_is_of_paired_differences():
    # pass@2 of 1, 0, 1, 0 less that of 0, 0, 1, 0 is 1, 0, 0, 0: mean 1/4, sd 1/2, and z(0.8) = 0.8416
    mean, low = lower_net(outcomes(1, 0, 2, 0), outcomes(0, 0, 1, 0), k=2, confidence=0.8)
    assert mean == 0.25
    assert low == pytest.approx(0.25 - 0.8416 * 0.5 / math.sqrt(4), abs=1e-4)


def test_where_neither_solves_anything_there_is_no_help():
    assert lower_net(outcomes(0, 0), outcomes(0, 0), k=2, confidence=0.8) == (0.0, 0.0)


def test_the_largest_s_is_taken_and_asked():
    best = best_of([trial(1.0, signal=0.1), trial(2.0, signal=0.3), trial(4.0, signal=0.2)], max_kl=4.0)
    choice = choice_of(best, standing=STANDING)
    assert (choice.spec.a, choice.is_active) == (2.0, True)


def test_a_push_that_breaks_the_law_is_passed_over_however_good():
    best = best_of([trial(1.0, signal=0.1), trial(4.0, signal=0.9, kl=4.1)], max_kl=4.0)
    assert best.push.a == 1.0


@pytest.mark.parametrize("low", [0.0, -0.1])
def test_it_backs_off_where_the_gain_could_be_nothing(low):
    choice = choice_of(best_of([trial(1.0, signal=0.1, low=low)], max_kl=4.0), standing=STANDING)
    assert (choice.spec.a, choice.is_active) == (1.0, False)


def test_where_all_are_broken_the_old_one_stands_and_nobody_is_asked():
    choice = choice_of(best_of([trial(1.0, signal=0.1, kl=9.0)], max_kl=4.0), standing=STANDING)
    assert (choice.spec, choice.is_active) == (STANDING, False)


def test_a_trial_is_told_by_the_name_of_its_push():
    assert row_of(trial(1.5, signal=0.1))["push"] == "logits:20:1.5"
