import statistics
from dataclasses import replace

import pytest

from npo_cli.guide.mix import mix_counts, own_rollouts, seat_guides
from npo_cli.records import Group, GuideTrajectory, Prompt, Rollout

GUIDE = GuideTrajectory(
    prompt_id="a",
    response_ids=(5, 6, 2),
    behavior_logps=(-0.1, -0.2, -0.3),
    text="42",
    verdict="correct",
    guide_step=80,
    num_sampled=8,
    num_correct=3,
)


def group_of(*correct: bool, prompt_id: str = "a") -> Group:
    rollouts = tuple(
        Rollout(
            prompt_id=prompt_id,
            slot=slot,
            response_ids=(1, 2),
            behavior_logps=(-1.0, -1.0),
            text="?",
            finished=True,
            sampler_step=20,
            mean_entropy=0.5,
            verdict="correct" if right else "wrong",
            reward=float(right),
        )
        for slot, right in enumerate(correct)
    )
    return Group(prompt=Prompt(prompt_id=prompt_id, answer="42", text="6*7="), rollouts=rollouts)


def test_a_failed_group_gives_its_last_slot_to_the_guide():
    group = group_of(*[False] * 8)
    (mixed,) = seat_guides([group], {"a": GUIDE}, gate=0.6)
    assert mixed.rollouts[:7] == group.rollouts[:7]
    assert mixed.rollouts[7] == Rollout(
        prompt_id="a",
        slot=7,
        response_ids=(5, 6, 2),
        behavior_logps=(-0.1, -0.2, -0.3),
        text="42",
        finished=True,
        sampler_step=80,
        source="guide",
        mean_entropy=None,
        verdict="correct",
        reward=1.0,
    )
    assert mixed.rollouts[7].guide_step == 80
    assert (mixed.mix, mixed.own_accuracy) == ("injected", 0.0)


def test_one_guide_in_an_all_wrong_group_carries_its_advantages():
    (mixed,) = seat_guides([group_of(*[False] * 8)], {"a": GUIDE}, gate=0.6)
    rewards = [rollout.reward for rollout in mixed.rollouts]
    # mean 1/8; variance (7/8)^2 + 7 (1/8)^2 = 7/8 over 7 = 1/8; sd = 0.353553
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    advantages = [(reward - mean) / spread for reward in rewards]
    assert advantages == pytest.approx([-0.353553] * 7 + [2.474874], abs=1e-6)


def test_the_gate_lets_exactly_its_own_share_through():
    at_gate = group_of(True, True, True, False, False)  # 3/5 = 0.6
    above = group_of(*[True] * 5, *[False] * 3)  # 5/8
    assert [group.mix for group in seat_guides([at_gate, above], {"a": GUIDE}, gate=0.6)] == ["injected", "gate_closed"]


def test_with_eight_slots_the_gate_admits_none_to_four_correct():
    groups = [group_of(*[True] * c, *[False] * (8 - c)) for c in range(9)]
    outcomes = [group.mix for group in seat_guides(groups, {"a": GUIDE}, gate=0.6)]
    assert outcomes == ["injected"] * 5 + ["gate_closed"] * 4


def test_accuracy_is_counted_before_the_guide_sits_down():
    # the slot given away was itself correct
    (mixed,) = seat_guides([group_of(False, False, False, True)], {"a": GUIDE}, gate=0.6)
    assert mixed.own_accuracy == 0.25
    assert [rollout.reward for rollout in mixed.rollouts] == [0.0, 0.0, 0.0, 1.0]


def test_groups_that_get_no_guide_keep_their_rollouts():
    easy, alone = group_of(True, True), group_of(False, False, prompt_id="b")
    closed, missing = seat_guides([easy, alone], {"a": GUIDE}, gate=0.6)
    assert closed == replace(easy, mix="gate_closed", own_accuracy=1.0)
    assert missing == replace(alone, mix="no_guide", own_accuracy=0.0)


def test_verdicts_not_rewards_decide_the_gate():
    # an overlong penalty may shift rewards; correctness stays correctness
    (group,) = [group_of(True, True)]
    shaped = replace(group, rollouts=tuple(replace(rollout, reward=-0.5) for rollout in group.rollouts))
    assert seat_guides([shaped], {"a": GUIDE}, gate=0.6)[0].mix == "gate_closed"


def test_own_rollouts_leave_the_guide_out():
    (mixed,) = seat_guides([group_of(*[False] * 4)], {"a": GUIDE}, gate=0.6)
    assert [rollout.slot for rollout in own_rollouts(mixed)] == [0, 1, 2]
    assert len(own_rollouts(group_of(True, False))) == 2


def test_counts_split_the_batch_by_outcome():
    groups = [group_of(False), group_of(False, prompt_id="b"), group_of(False, prompt_id="c"), group_of(True)]
    assert mix_counts(seat_guides(groups, {"a": GUIDE}, gate=0.6)) == {
        "inject/slots": 1.0,
        "inject/eligible": 3.0,
        "inject/no_guide": 2.0,
        "inject/gate_closed": 1.0,
    }


def test_where_no_guide_is_at_work_every_count_is_nought():
    assert set(mix_counts([group_of(True)]).values()) == {0.0}


def test_an_unverified_group_is_our_own_mistake():
    group = group_of(False)
    raw = replace(group, rollouts=(replace(group.rollouts[0], verdict=None),))
    with pytest.raises(AssertionError):
        seat_guides([raw], {"a": GUIDE}, gate=0.6)
