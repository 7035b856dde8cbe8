import statistics
from dataclasses import replace

import pytest

from npo_cli.config.guides import InjectSettings
from npo_cli.config.loading import load_recipe
from npo_cli.errors import NpoError, RunFailed
from npo_cli.registry import MIX_STRATEGIES
from npo_cli.rollout.mixing import AppendSlots, MixStrategy, count_injections, make_mix_strategy
from npo_cli.types.rollouts import Group, Prompt, Rollout, TokenSpan

GUIDE = Rollout(
    prompt_id="a",
    slot=0,
    response_ids=(5, 6, 2),
    behavior_logps=(-0.1, -0.2, -0.3),
    text="42",
    finished=True,
    sampler_step=80,
    source="guide",
    verdict="correct",
    reward=1.0,
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


def mix(groups: list[Group], guides: tuple[Rollout, ...] = (GUIDE,), **changes: object) -> list[Group]:
    """Each group mixed by the strategy of these settings, with its own size as group size unless given."""
    mixed = []
    for group in groups:
        size = changes.get("group_size", len(group.rollouts))
        mixed += strategy(**{**changes, "group_size": size}).mix_groups([group], {"a": guides})
    return mixed


def strategy(*, group_size: int, seed: int = 0, **settings: object) -> MixStrategy:
    settings = InjectSettings(max_accuracy=0.6).model_copy(update=settings)
    return make_mix_strategy(settings, group_size=group_size, seed=seed)


def test_mixing_replaces_the_last_slot_of_a_failed_group():
    group = group_of(*[False] * 8)
    (mixed,) = mix([group])
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


def test_mixing_gives_an_all_wrong_group_advantages():
    (mixed,) = mix([group_of(*[False] * 8)])
    rewards = [rollout.reward for rollout in mixed.rollouts]
    # mean 1/8; variance (7/8)^2 + 7 (1/8)^2 = 7/8 over 7 = 1/8; sd = 0.353553
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    advantages = [(reward - mean) / spread for reward in rewards]
    assert advantages == pytest.approx([-0.353553] * 7 + [2.474874], abs=1e-6)


def test_mixing_threshold_is_inclusive():
    at_gate = group_of(True, True, True, False, False)  # 3/5 = 0.6
    above = group_of(*[True] * 5, *[False] * 3)  # 5/8
    assert [group.injection_status for group in mix([at_gate, above])] == ["injected", "gate_closed"]


def test_mixing_threshold_admits_zero_to_four_correct_of_eight():
    groups = [group_of(*[True] * c, *[False] * (8 - c)) for c in range(9)]
    outcomes = [group.injection_status for group in mix(groups)]
    assert outcomes == ["injected"] * 5 + ["gate_closed"] * 4


def test_mixing_records_accuracy_before_injection():
    # the slot given away was itself correct
    (mixed,) = mix([group_of(False, False, False, True)])
    assert mixed.on_policy_accuracy == 0.25
    assert [rollout.reward for rollout in mixed.rollouts] == [0.0, 0.0, 0.0, 1.0]


def test_mixing_leaves_groups_without_a_guide_as_they_were():
    easy, alone = group_of(True, True), group_of(False, False, prompt_id="b")
    closed, missing = mix([easy, alone])
    assert closed == replace(easy, injection_status="gate_closed", on_policy_accuracy=1.0)
    assert missing == replace(alone, injection_status="no_guide", on_policy_accuracy=0.0)


def test_mixing_threshold_uses_verdicts_not_rewards():
    # an overlong penalty may shift rewards; correctness stays correctness
    (group,) = [group_of(True, True)]
    shaped = replace(group, rollouts=tuple(replace(rollout, reward=-0.5) for rollout in group.rollouts))
    assert mix([shaped])[0].injection_status == "gate_closed"


def test_group_on_policy_excludes_injected_rollouts():
    (mixed,) = mix([group_of(*[False] * 4)])
    assert [rollout.slot for rollout in mixed.on_policy.rollouts] == [0, 1, 2]
    assert len(group_of(True, False).on_policy.rollouts) == 2


def test_injection_metrics_count_groups_by_status():
    groups = [group_of(False), group_of(False, prompt_id="b"), group_of(False, prompt_id="c"), group_of(True)]
    assert count_injections(mix(groups)) == {
        "inject/slots": 1.0,
        "inject/eligible": 3.0,
        "inject/no_guide": 2.0,
        "inject/gate_closed": 1.0,
    }


def test_injection_metrics_without_a_guide_are_zero():
    assert set(count_injections([group_of(True)]).values()) == {0.0}


def test_mixing_refuses_an_unverified_group():
    group = group_of(False)
    raw = replace(group, rollouts=(replace(group.rollouts[0], verdict=None),))
    with pytest.raises(AssertionError):
        mix([raw])


def trajectory(number: int, **changes: object) -> Rollout:
    return replace(GUIDE, slot=number, text=str(number), **changes)


def test_mixing_append_adds_slots():
    group = group_of(*[False] * 4)
    (mixed,) = mix([group], (trajectory(0), trajectory(1)), mode="append", slots=2, max_accuracy=1.0)
    assert mixed.rollouts[:4] == group.rollouts
    assert [(rollout.slot, rollout.source) for rollout in mixed.rollouts[4:]] == [(4, "guide"), (5, "guide")]


def test_mixing_injects_no_more_guides_than_cached():
    (mixed,) = mix([group_of(*[False] * 4)], (trajectory(0),), mode="append", slots=2)
    assert len(mixed.rollouts) == 5


def test_mixing_seed_chooses_among_more_guides_than_slots():
    three = tuple(map(trajectory, range(3)))
    seen = set()
    for seed in range(40):
        (mixed,), (again,) = (mix([group_of(*[False] * 4)], three, slots=2, seed=seed) for _ in range(2))
        assert mixed == again
        pair = {rollout.text for rollout in mixed.rollouts if rollout.is_off_policy}
        assert len(pair) == 2
        seen.add(frozenset(pair))
    assert len(seen) == 3


def test_mixing_without_threshold_does_not_sample_replaced_slots():
    ungated = strategy(max_accuracy=1.0, slots=2, group_size=8)
    assert [ungated.num_to_sample(num_guides) for num_guides in (0, 1, 3)] == [8, 7, 6]
    assert strategy(max_accuracy=0.99, slots=2, group_size=8).num_to_sample(1) == 8
    assert strategy(max_accuracy=1.0, slots=2, group_size=8, mode="append").num_to_sample(1) == 8
    # seven were sampled, all of them right: the eighth slot is the guide's all the same
    (mixed,) = mix([group_of(*[True] * 7)], max_accuracy=1.0, group_size=8)
    assert [rollout.slot for rollout in mixed.rollouts] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert mixed.rollouts[7].is_off_policy


def test_mixing_keeps_verdict_and_missing_logprobs_of_a_wrong_teacher():
    wrong = trajectory(
        0, source="teacher", verdict="wrong", reward=0.0, behavior_logps=None, sampler_step=None, finished=False
    )
    (mixed,) = mix([group_of(*[False] * 4)], (wrong,))
    last = mixed.rollouts[-1]
    assert (last.source, last.reward, last.behavior_logps, last.sampler_step, last.finished) == (
        "teacher",
        0.0,
        None,
        None,
        False,
    )
    assert last.guide_step is None


# New strategies


class GuidePrefix(MixStrategy):
    """The last slot holds the first token of a guide, then the tokens of the on-policy rollout that was there."""

    name = "prefix"

    def fill_slots(self, on_policy, guides):
        (guide,), last = guides, on_policy[-1]
        rest = last.response_ids[1:]
        spans = (
            TokenSpan(start=0, end=1, source="guide", sampler_step=guide.sampler_step),
            TokenSpan(start=1, end=1 + len(rest), sampler_step=last.sampler_step),
        )
        ids = (*guide.response_ids[:1], *rest)
        logps = (*guide.behavior_logps[:1], *last.behavior_logps[1:])
        return (*on_policy[:-1], replace(last, response_ids=ids, behavior_logps=logps, spans=spans, source="guide"))


@pytest.mark.parametrize("name", MIX_STRATEGIES.names())
def test_mixing_strategy_has_its_registered_name(name):
    assert type(strategy(group_size=2, mode=name)).name == name


def test_mixing_strategy_none_takes_no_slots():
    groups = [group_of(False, False), group_of(True, True)]
    chosen = strategy(group_size=2, slots=2, mode="none")
    assert chosen.mix_groups(groups, {"a": (GUIDE, GUIDE)}) == groups
    assert chosen.num_to_sample(2) == 2


@pytest.mark.parametrize("name", [name for name in MIX_STRATEGIES.names() if name != "none"])
def test_mixing_strategy_keeps_rewards_and_order_and_says_what_it_did(name):
    guides = {"a": (GUIDE,), "c": (replace(GUIDE, prompt_id="c"),)}
    groups = [group_of(False, False), group_of(False, False, prompt_id="b"), group_of(True, True, prompt_id="c")]
    chosen = strategy(group_size=2, mode=name)
    mixed = chosen.mix_groups(groups, guides)
    assert [group.prompt.prompt_id for group in mixed] == ["a", "b", "c"]
    assert [group.injection_status for group in mixed] == ["injected", "no_guide", "gate_closed"]
    assert [group.on_policy_accuracy for group in mixed] == [0.0, 0.0, 1.0]
    assert [group.rollouts for group in mixed[1:]] == [group.rollouts for group in groups[1:]]
    first = mixed[0].rollouts
    assert [rollout.slot for rollout in first] == list(range(len(first)))
    assert len(first) == 2 or (chosen.adds_rollouts and len(first) > 2)
    assert any(rollout.is_off_policy for rollout in first)
    assert all(rollout.reward == (1.0 if rollout.is_correct else 0.0) for rollout in first)


class OnlyTheFirst(MixStrategy):
    name = "first"

    def fill_slots(self, on_policy, guides):
        return on_policy[:1]


class OneTooMany(MixStrategy):
    name = "many"

    def fill_slots(self, on_policy, guides):
        return [*on_policy, *guides]


@pytest.mark.parametrize(("added", "count"), [(OnlyTheFirst, 1), (OneTooMany, 4)])
def test_mixing_strategy_that_changes_the_group_size_is_refused(added, count):
    with (
        MIX_STRATEGIES.registered(added),
        pytest.raises(RunFailed, match=rf"mode={added.name} filled a group with {count} rollouts"),
    ):
        mix([group_of(False, False, False)], mode=added.name)


def test_mixing_strategy_decides_slots_and_tokens():
    with MIX_STRATEGIES.registered(GuidePrefix):
        (mixed,) = mix([group_of(False, False)], mode="prefix")
    last = mixed.rollouts[-1]
    assert (last.slot, last.response_ids, last.behavior_logps) == (1, (5, 2), (-0.1, -1.0))
    assert [(span.source, span.sampler_step, span.end - span.start) for span in last.provenance] == [
        ("guide", 80, 1),
        ("own", 20, 1),
    ]
    assert (last.is_off_policy, last.num_on_policy_tokens) == (True, 1)
    assert [rollout.slot for rollout in mixed.on_policy.rollouts] == [0]


class GuidePrefixes(AppendSlots):
    name = "prefixes"


def test_mixing_mode_is_a_registered_name():
    with pytest.raises(NpoError, match=r"guide\.inject\.mode=apend is not a known mix strategy: did you mean append\?"):
        load_recipe("micro", ["guide.inject.mode=apend"])


def test_mixing_slots_are_limited_unless_the_strategy_adds_rollouts():
    many = ["train.group_size=4", "guide.inject.slots=4"]
    with MIX_STRATEGIES.registered(GuidePrefix), MIX_STRATEGIES.registered(GuidePrefixes):
        for mode in ("append", "prefixes"):
            assert load_recipe("micro", [*many, f"guide.inject.mode={mode}"]).guide.inject.slots == 4
        for mode in ("replace", "prefix"):
            with pytest.raises(NpoError, match=r"guide\.inject\.slots must be below train\.group_size"):
                load_recipe("micro", [*many, f"guide.inject.mode={mode}"])


def test_mixing_strategy_from_outside_is_refused_with_an_online_guide():
    online = ["guide.source=extrapolated", "extrapolation.k=20", "train.save_every=20"]
    with MIX_STRATEGIES.registered(GuidePrefix):
        assert load_recipe("micro", [*online, "guide.inject.mode=append"]).guide.source == "extrapolated"
        with pytest.raises(NpoError, match=r"guide\.inject\.mode must be replace or append, got prefix"):
            load_recipe("micro", [*online, "guide.inject.mode=prefix"])


def test_token_spans_must_cover_the_response():
    rollout = group_of(True).rollouts[0]
    for spans in ([(0, 1)], [(0, 1), (0, 2)], [(1, 2)], [(0, 3)]):
        with pytest.raises(ValueError, match="do not cover a response of 2 tokens"):
            replace(rollout, spans=tuple(TokenSpan(start=start, end=end) for start, end in spans))
