"""Who is asked, who takes a slot, and what is spare."""

import pytest

from npo_cli.config.guides import InjectSettings
from npo_cli.guides.online import (
    extrapolated_rollouts,
    extrapolation_metrics,
    inject_responses,
    select_failed_groups,
)
from npo_cli.rollout.mixing import make_mix_strategy
from npo_cli.types.rollouts import Group, Prompt, Rollout

SETTINGS = InjectSettings(max_accuracy=0.25)


def rollout(slot: int, *, right: bool, source: str = "own", finished: bool = True) -> Rollout:
    return Rollout(
        prompt_id="a",
        slot=slot,
        response_ids=(1, 2, 3),
        behavior_logps=(-1.0, -1.0, -1.0),
        text="x",
        finished=finished,
        sampler_step=7,
        source=source,
        verdict="correct" if right else "wrong",
        reward=float(right),
    )


def group(*right: bool) -> Group:
    rollouts = tuple(rollout(slot, right=each) for slot, each in enumerate(right))
    return Group(prompt=Prompt(prompt_id="a", answer="1", text="?"), rollouts=rollouts)


def said(*right: bool, first: int = 0, finished: bool = True) -> tuple[Rollout, ...]:
    return tuple(
        rollout(first + place, right=each, source="extrapolated", finished=finished) for place, each in enumerate(right)
    )


def seated(own: Group, answers: tuple[Rollout, ...], *, num_judged: int = 4, seat: str = "inject", **changes) -> Group:
    strategy = make_mix_strategy(SETTINGS.model_copy(update=changes), group_size=4, seed=0)
    return inject_responses(own, answers, strategy, num_gate_rollouts=num_judged, mode=seat)


def test_groups_at_the_gate_are_hard():
    easy, hard = group(True, True, False, False), group(True, False, False, False)
    assert select_failed_groups([easy, hard], make_mix_strategy(SETTINGS, group_size=4, seed=0)) == [hard]


def test_the_first_right_answer_takes_the_last_slot_and_the_rest_is_spare():
    found = seated(group(False, False, False, False), said(False, True, True))
    assert [one.source for one in found.rollouts] == ["own", "own", "own", "extrapolated"]
    assert (found.rollouts[3].slot, found.rollouts[3].reward, found.injection_status, found.on_policy_accuracy) == (
        3,
        1.0,
        "injected",
        0,
    )
    assert [(one.slot, one.verdict) for one in found.unused_guide_rollouts] == [(0, "wrong"), (2, "correct")]


def test_no_more_are_seated_than_slots_are_given():
    found = seated(group(False, False, False, False), said(True, True, True), slots=2)
    assert [one.slot for one in found.rollouts if one.is_off_policy] == [2, 3]
    assert len(found.unused_guide_rollouts) == 1


def test_appended_it_leaves_every_own_answer_its_slot():
    found = seated(group(False, False, False, False), said(True), mode="append")
    assert [one.slot for one in found.rollouts] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("answers", [said(False, False), said(True, finished=False)], ids=["wrong", "cut off"])
def test_without_a_right_answer_the_group_stays_its_own_and_the_answers_are_on_record(answers):
    own = group(True, False, False, False)
    found = seated(own, answers)
    assert (found.injection_status, found.rollouts, found.unused_guide_rollouts) == ("no_guide", own.rollouts, answers)


def test_a_seat_keeps_a_wrong_answer():
    own = group(False, False, False)
    found = seated(own, said(False, first=3), num_judged=3, seat="sample")
    assert [(one.slot, one.source, one.reward) for one in found.rollouts[3:]] == [(3, "extrapolated", 0.0)]
    assert (found.injection_status, found.unused_guide_rollouts) == ("injected", ())


def test_only_the_answers_before_the_gate_decide():
    """1 of the first 2 is above the gate; that all 4 come to 1/4 was not known when the gate was looked at."""
    own = group(True, False, False, False)
    found = seated(own, (), num_judged=2, seat="sample")
    assert (found.injection_status, found.on_policy_accuracy, found.rollouts) == ("gate_closed", 0.5, own.rollouts)


def test_what_is_recorded_seats_again_the_same():
    own = group(False, False, False, False)
    once = seated(own, said(False, True, False))
    assert seated(own, extrapolated_rollouts(once)).rollouts == once.rollouts


def test_counts_hold_spare_answers_too():
    groups = [seated(group(False, False, False, False), said(False, True)), group(True, True, True, True)]
    # one group asked, 2 answers of 3 tokens, one right
    assert extrapolation_metrics(groups) == {
        "extrapolate/groups": 1.0,
        "extrapolate/answers": 2.0,
        "extrapolate/correct": 1.0,
        "extrapolate/tokens": 6.0,
    }
