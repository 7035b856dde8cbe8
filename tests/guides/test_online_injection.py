"""Online extrapolation: which groups get guide rollouts, which slots they take, and which stay unused."""

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


def rollout(slot: int, *, correct: bool, source: str = "own", finished: bool = True) -> Rollout:
    return Rollout(
        prompt_id="a",
        slot=slot,
        response_ids=(1, 2, 3),
        behavior_logps=(-1.0, -1.0, -1.0),
        text="x",
        finished=finished,
        sampler_step=7,
        source=source,
        verdict="correct" if correct else "wrong",
        reward=float(correct),
    )


def group(*correct: bool) -> Group:
    rollouts = tuple(rollout(slot, correct=each) for slot, each in enumerate(correct))
    return Group(prompt=Prompt(prompt_id="a", answer="1", text="?"), rollouts=rollouts)


def extrapolated(*correct: bool, first: int = 0, finished: bool = True) -> tuple[Rollout, ...]:
    return tuple(
        rollout(first + place, correct=each, source="extrapolated", finished=finished)
        for place, each in enumerate(correct)
    )


def inject(
    own: Group, responses: tuple[Rollout, ...], *, num_gate_rollouts: int = 4, slot_mode: str = "inject", **changes
) -> Group:
    strategy = make_mix_strategy(SETTINGS.model_copy(update=changes), group_size=4, seed=0)
    return inject_responses(own, responses, strategy, num_gate_rollouts=num_gate_rollouts, mode=slot_mode)


def test_online_injection_selects_groups_at_or_below_the_gate():
    easy, hard = group(True, True, False, False), group(True, False, False, False)
    assert select_failed_groups([easy, hard], make_mix_strategy(SETTINGS, group_size=4, seed=0)) == [hard]


def test_online_injection_puts_the_first_correct_response_into_the_last_slot():
    found = inject(group(False, False, False, False), extrapolated(False, True, True))
    assert [one.source for one in found.rollouts] == ["own", "own", "own", "extrapolated"]
    assert (found.rollouts[3].slot, found.rollouts[3].reward, found.injection_status, found.on_policy_accuracy) == (
        3,
        1.0,
        "injected",
        0,
    )
    assert [(one.slot, one.verdict) for one in found.unused_guide_rollouts] == [(0, "wrong"), (2, "correct")]


def test_online_injection_fills_at_most_inject_slots():
    found = inject(group(False, False, False, False), extrapolated(True, True, True), slots=2)
    assert [one.slot for one in found.rollouts if one.is_off_policy] == [2, 3]
    assert len(found.unused_guide_rollouts) == 1


def test_online_injection_append_keeps_every_own_slot():
    found = inject(group(False, False, False, False), extrapolated(True), mode="append")
    assert [one.slot for one in found.rollouts] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "responses", [extrapolated(False, False), extrapolated(True, finished=False)], ids=["wrong", "cut off"]
)
def test_online_injection_without_a_correct_response_records_unused_rollouts(responses):
    own = group(True, False, False, False)
    found = inject(own, responses)
    assert (found.injection_status, found.rollouts, found.unused_guide_rollouts) == (
        "no_guide",
        own.rollouts,
        responses,
    )


def test_sample_mode_keeps_a_wrong_response():
    own = group(False, False, False)
    found = inject(own, extrapolated(False, first=3), num_gate_rollouts=3, slot_mode="sample")
    assert [(one.slot, one.source, one.reward) for one in found.rollouts[3:]] == [(3, "extrapolated", 0.0)]
    assert (found.injection_status, found.unused_guide_rollouts) == ("injected", ())


def test_sample_mode_gate_counts_only_the_rollouts_before_it():
    """1 of the first 2 is above the gate; that all 4 come to 1/4 is not known at the gate."""
    own = group(True, False, False, False)
    found = inject(own, (), num_gate_rollouts=2, slot_mode="sample")
    assert (found.injection_status, found.on_policy_accuracy, found.rollouts) == ("gate_closed", 0.5, own.rollouts)


def test_online_injection_of_recorded_rollouts_is_the_same_again():
    own = group(False, False, False, False)
    once = inject(own, extrapolated(False, True, False))
    assert inject(own, extrapolated_rollouts(once)).rollouts == once.rollouts


def test_extrapolation_metrics_count_unused_rollouts():
    groups = [inject(group(False, False, False, False), extrapolated(False, True)), group(True, True, True, True)]
    # one failed group, 2 responses of 3 tokens, one correct
    assert extrapolation_metrics(groups) == {
        "extrapolate/groups": 1.0,
        "extrapolate/answers": 2.0,
        "extrapolate/correct": 1.0,
        "extrapolate/tokens": 6.0,
    }
