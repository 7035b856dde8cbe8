import statistics
from dataclasses import replace

import pytest

from npo_cli.rollout.mixing import InjectionPolicy, count_injections, count_on_policy, inject_guides, select_on_policy
from npo_cli.types.guides import GuideRollout
from npo_cli.types.rollouts import Group, Prompt, Rollout

GUIDE = GuideRollout(
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


def seated(groups: list[Group], guides: tuple[GuideRollout, ...] = (GUIDE,), **changes: object) -> list[Group]:
    """Each group by the default rule for its own size."""
    plain = {"gate": 0.6, "slots": 1, "compose": "replace", "seed": 0}
    found = []
    for group in groups:
        rule = InjectionPolicy(**({"group_size": len(group.rollouts)} | plain | changes))
        found += inject_guides([group], {"a": guides}, rule)
    return found


def test_a_failed_group_gives_its_last_slot_to_the_guide():
    group = group_of(*[False] * 8)
    (mixed,) = seated([group])
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
    assert (mixed.injection_status, mixed.on_policy_accuracy) == ("injected", 0.0)


def test_one_guide_in_an_all_wrong_group_carries_its_advantages():
    (mixed,) = seated([group_of(*[False] * 8)])
    rewards = [rollout.reward for rollout in mixed.rollouts]
    # mean 1/8; variance (7/8)^2 + 7 (1/8)^2 = 7/8 over 7 = 1/8; sd = 0.353553
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    advantages = [(reward - mean) / spread for reward in rewards]
    assert advantages == pytest.approx([-0.353553] * 7 + [2.474874], abs=1e-6)


def test_the_gate_lets_exactly_its_own_share_through():
    at_gate = group_of(True, True, True, False, False)  # 3/5 = 0.6
    above = group_of(*[True] * 5, *[False] * 3)  # 5/8
    assert [group.injection_status for group in seated([at_gate, above])] == ["injected", "gate_closed"]


def test_with_eight_slots_the_gate_admits_none_to_four_correct():
    groups = [group_of(*[True] * c, *[False] * (8 - c)) for c in range(9)]
    outcomes = [group.injection_status for group in seated(groups)]
    assert outcomes == ["injected"] * 5 + ["gate_closed"] * 4


def test_accuracy_is_counted_before_the_guide_sits_down():
    # the slot given away was itself correct
    (mixed,) = seated([group_of(False, False, False, True)])
    assert mixed.on_policy_accuracy == 0.25
    assert [rollout.reward for rollout in mixed.rollouts] == [0.0, 0.0, 0.0, 1.0]


def test_groups_that_get_no_guide_keep_their_rollouts():
    easy, alone = group_of(True, True), group_of(False, False, prompt_id="b")
    closed, missing = seated([easy, alone])
    assert closed == replace(easy, injection_status="gate_closed", on_policy_accuracy=1.0)
    assert missing == replace(alone, injection_status="no_guide", on_policy_accuracy=0.0)


def test_verdicts_not_rewards_decide_the_gate():
    # an overlong penalty may shift rewards; correctness stays correctness
    (group,) = [group_of(True, True)]
    shaped = replace(group, rollouts=tuple(replace(rollout, reward=-0.5) for rollout in group.rollouts))
    assert seated([shaped])[0].injection_status == "gate_closed"


def test_own_rollouts_leave_the_guide_out():
    (mixed,) = seated([group_of(*[False] * 4)])
    assert [rollout.slot for rollout in select_on_policy(mixed)] == [0, 1, 2]
    assert len(select_on_policy(group_of(True, False))) == 2


def test_counts_split_the_batch_by_outcome():
    groups = [group_of(False), group_of(False, prompt_id="b"), group_of(False, prompt_id="c"), group_of(True)]
    assert count_injections(seated(groups)) == {
        "inject/slots": 1.0,
        "inject/eligible": 3.0,
        "inject/no_guide": 2.0,
        "inject/gate_closed": 1.0,
    }


def test_where_no_guide_is_at_work_every_count_is_nought():
    assert set(count_injections([group_of(True)]).values()) == {0.0}


def test_an_unverified_group_is_our_own_mistake():
    group = group_of(False)
    raw = replace(group, rollouts=(replace(group.rollouts[0], verdict=None),))
    with pytest.raises(AssertionError):
        seated([raw])


# Other compositions


def trajectory(number: int, **changes: object) -> GuideRollout:
    return replace(GUIDE, number=number, text=str(number), **changes)


def test_appended_guides_make_the_group_longer_and_take_nothing_away():
    group = group_of(*[False] * 4)
    (mixed,) = seated([group], (trajectory(0), trajectory(1)), compose="append", slots=2, gate=1.0)
    assert mixed.rollouts[:4] == group.rollouts
    assert [(rollout.slot, rollout.source) for rollout in mixed.rollouts[4:]] == [(4, "guide"), (5, "guide")]


def test_a_group_gets_no_more_guides_than_there_are():
    (mixed,) = seated([group_of(*[False] * 4)], (trajectory(0),), compose="append", slots=2)
    assert len(mixed.rollouts) == 5


def test_among_more_trajectories_than_slots_the_seed_chooses_and_finds_all_of_them():
    three = tuple(map(trajectory, range(3)))
    seen = set()
    for seed in range(40):
        (mixed,), (again,) = (seated([group_of(*[False] * 4)], three, slots=2, seed=seed) for _ in range(2))
        assert mixed == again
        pair = {rollout.text for rollout in mixed.rollouts if rollout.is_off_policy}
        assert len(pair) == 2
        seen.add(frozenset(pair))
    assert len(seen) == 3


def test_without_a_gate_a_slot_that_is_given_away_is_not_sampled_first():
    rule = InjectionPolicy(gate=1.0, slots=2, compose="replace", group_size=8, seed=0)
    assert (
        count_on_policy(rule, ()),
        count_on_policy(rule, (GUIDE,)),
        count_on_policy(rule, (GUIDE, GUIDE, GUIDE)),
    ) == (8, 7, 6)
    assert count_on_policy(replace(rule, gate=0.99), (GUIDE,)) == 8
    assert count_on_policy(replace(rule, compose="append"), (GUIDE,)) == 8
    # seven were sampled, all of them right: the eighth slot is the guide's all the same
    (mixed,) = seated([group_of(*[True] * 7)], gate=1.0, group_size=8)
    assert [rollout.slot for rollout in mixed.rollouts] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert mixed.rollouts[7].is_off_policy


def test_a_wrong_teacher_is_seated_with_its_own_verdict_and_no_log_probabilities():
    wrong = trajectory(0, source="teacher", verdict="wrong", behavior_logps=None, guide_step=None, finished=False)
    (mixed,) = seated([group_of(*[False] * 4)], (wrong,))
    last = mixed.rollouts[-1]
    assert (last.source, last.reward, last.behavior_logps, last.sampler_step, last.finished) == (
        "teacher",
        0.0,
        None,
        None,
        False,
    )
    assert last.guide_step is None
