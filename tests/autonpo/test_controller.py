"""One fact at a time: every move of the diagram, and the steps at which it is made."""

from dataclasses import asdict, replace

import pytest

from npo_cli.autonpo.controller import advance, explain_no_trigger
from npo_cli.autonpo.events import ExtrapolationStarted, ReplayJudged, RollbackDone, StepObserved
from npo_cli.types.autonpo import AutoNPOState, TriggerReading
from tests.autonpo.simulated_signals import ACCEPTED, CONTROL, GUIDED, MISSED, REJECTED, START, UNGUIDED

ARMED = AutoNPOState(branch="main", step=100)
WARNED = replace(ARMED, stagnation_streak=5, has_warned=True)
PROBING = replace(ARMED, phase="PROBE")
PUSHING = replace(ARMED, phase="PUSH")
AHEAD = AutoNPOState(branch="ahead", step=100, phase="AHEAD", until_step=120)
PUSHED = ExtrapolationStarted(branch="ahead", until_step=120)
TRYING = replace(CONTROL, push_steps=20)
GUIDING = replace(ARMED, phase="GUIDE_GEN", distance=20)
LEAVING = replace(ARMED, phase="ROLLBACK", distance=20)
JUDGING = AutoNPOState(branch="auto-1", step=100, phase="JUDGE", distance=20, num_interventions=1)
REPLAYING = AutoNPOState(branch="auto-1", step=80, phase="REPLAY", distance=20, until_step=100, num_interventions=1)
ROLLED_BACK = RollbackDone(branch="auto-1", to_step=80, until_step=100)


def seen(step, verdict="rising", *, has_checkpoint=False):
    signal = None if verdict == "no_signal" else 0.3
    reading = TriggerReading(step=step, verdict=verdict, reward=signal, entropy=signal)
    return StepObserved(reading=reading, has_checkpoint=has_checkpoint)


def tell(state, *facts, knobs=CONTROL):
    """The state after all of them, and the moves as (step, event, phase before, phase after)."""
    moves = []
    for fact in facts:
        state, made = advance(state, fact, knobs=knobs)
        moves += [(move.step, move.event, move.phase_before, move.state.phase) for move in made]
        assert not made or made[-1].state == state
    return state, moves


# The cheap intervention


def test_a_trigger_leads_to_a_push_first_where_one_is_wanted():
    fact = seen(101, "stagnant", has_checkpoint=True)
    assert tell(WARNED, fact, knobs=TRYING)[1] == [(101, "trigger", "TRAIN", "PUSH")]
    assert tell(WARNED, fact)[1] == [(101, "trigger", "TRAIN", "PROBE")]


def test_a_push_is_looked_at_when_its_time_is_over():
    state, moves = tell(PUSHING, PUSHED, *(seen(step, "stagnant") for step in range(101, 120)), knobs=TRYING)
    assert moves == [(100, "pushed", "PUSH", "AHEAD")]
    assert (state.branch, state.step, state.until) == ("ahead", 119, 120)


@pytest.mark.parametrize("verdict", ["stagnant", "entropy_level", "no_signal", "short_history"])
def test_what_did_not_rise_is_asked(verdict):
    state, moves = tell(replace(AHEAD, step=119), seen(120, verdict), knobs=TRYING)
    assert moves == [(120, "unmoved", "AHEAD", "PROBE")]
    assert state.until is None


def test_what_rises_again_is_rest():
    state, moves = tell(replace(AHEAD, step=119), seen(120, "rising"), knobs=TRYING)
    assert moves == [(120, "moved", "AHEAD", "COOLDOWN")]
    # 120 + a cooldown of 40
    assert (state.until, state.num_interventions) == (160, 0)


def test_what_cannot_be_pushed_is_asked():
    assert tell(PUSHING, MISSED, knobs=TRYING)[1] == [(100, "unpushed", "PUSH", "PROBE")]


# The streak


def test_patience_steps_of_stagnation_make_one_warning():
    state, moves = tell(ARMED, *(seen(step, "stagnant") for step in range(101, 109)))
    assert moves == [(105, "warning", "TRAIN", "TRAIN")]
    assert (state.streak, state.has_warned, state.step) == (8, True, 108)


@pytest.mark.parametrize("verdict", ["rising", "entropy_level"])
def test_a_step_without_both_signs_ends_the_streak(verdict):
    state, moves = tell(replace(ARMED, stagnation_streak=4), seen(101, verdict), seen(102, "stagnant"))
    assert (state.streak, moves) == (1, [])


@pytest.mark.parametrize("verdict", ["no_signal", "short_history"])
def test_a_step_without_data_neither_lengthens_nor_ends_the_streak(verdict):
    state, moves = tell(replace(ARMED, stagnation_streak=4), seen(101, verdict), seen(102, "stagnant"))
    assert (state.streak, moves) == (5, [(102, "warning", "TRAIN", "TRAIN")])


def test_a_warned_run_recovers():
    state, moves = tell(WARNED, seen(101, "rising", has_checkpoint=True))
    assert moves == [(101, "recovered", "TRAIN", "TRAIN")]
    assert state == replace(ARMED, step=101)


def test_nothing_counts_before_the_warm_up_ends():
    state, moves = tell(START, *(seen(step, "stagnant") for step in range(1, 45)))
    # 41 is the first step that counts: 41, 42, 43, 44
    assert (state.streak, moves) == (4, [(41, "armed", "TRAIN", "TRAIN")])


def test_a_sparse_log_ends_the_warm_up_at_its_first_step_beyond_it():
    _, moves = tell(START, seen(30), seen(55), seen(80))
    assert moves == [(55, "armed", "TRAIN", "TRAIN")]


# The intervention


def test_a_warning_at_a_checkpoint_triggers_at_once():
    state, moves = tell(replace(ARMED, stagnation_streak=4), seen(101, "stagnant", has_checkpoint=True))
    assert moves == [(101, "warning", "TRAIN", "TRAIN"), (101, "trigger", "TRAIN", "PROBE")]
    assert state == AutoNPOState(branch="main", step=101, phase="PROBE")


def test_a_checkpoint_whose_signal_is_missing_still_serves_as_a_guide():
    _, moves = tell(WARNED, seen(101, "stagnant"), seen(102, "no_signal", has_checkpoint=True))
    assert moves == [(102, "trigger", "TRAIN", "PROBE")]


def test_a_trigger_says_what_was_seen():
    reading = TriggerReading(
        step=101, verdict="stagnant", reward=0.4, entropy=0.2, reward_gain=-0.01, reward_margin=0.02, entropy_drop=0.08
    )
    _, (move,) = advance(WARNED, StepObserved(reading=reading, has_checkpoint=True), knobs=CONTROL)
    assert move.evidence == {**{k: v for k, v in asdict(reading).items() if k != "step"}, "streak": 6}


def test_an_intervention_from_probe_to_rest():
    state, moves = tell(PROBING, ACCEPTED, GUIDED)
    assert moves == [(100, "accepted", "PROBE", "GUIDE_GEN"), (100, "guided", "GUIDE_GEN", "ROLLBACK")]
    assert state == LEAVING
    # back to 80, and 81 ... 100 again
    state, moves = tell(state, ROLLED_BACK)
    assert moves == [(100, "rolled_back", "ROLLBACK", "REPLAY")]
    assert state == REPLAYING
    state, moves = tell(state, *(seen(step, "stagnant", has_checkpoint=True) for step in range(81, 101)))
    assert moves == [(100, "replayed", "REPLAY", "COOLDOWN")]
    assert state == AutoNPOState(branch="auto-1", step=100, phase="COOLDOWN", until_step=140, num_interventions=1)


def test_the_evidence_is_plain_data():
    _, (accepted,) = advance(PROBING, ACCEPTED, knobs=CONTROL)
    assert accepted.evidence == asdict(ACCEPTED.confirmation)
    _, (guided,) = advance(GUIDING, GUIDED, knobs=CONTROL)
    assert guided.evidence == {
        "guide": "auto-1", "num_prompts": 90, "num_found": 30, "num_reused": 20, "num_tokens": 5000
    }  # fmt: skip
    _, (back,) = advance(LEAVING, ROLLED_BACK, knobs=CONTROL)
    assert back.evidence == {"branch": "auto-1", "to_step": 80, "until": 100, "parent": "main", "early": False}


@pytest.mark.parametrize(
    ("state", "fact", "event"),
    [
        (PROBING, REJECTED, "rejected"),
        (PROBING, MISSED, "missed"),
        (GUIDING, MISSED, "missed"),
        (LEAVING, MISSED, "missed"),
        (GUIDING, UNGUIDED, "unguided"),
    ],
)
def test_an_intervention_that_comes_to_nothing_rests(state, fact, event):
    after, moves = tell(state, fact)
    assert moves == [(100, event, state.phase, "COOLDOWN")]
    assert after == AutoNPOState(branch="main", step=100, phase="COOLDOWN", until_step=140)


def test_a_test_that_cannot_be_done_leaves_the_replay_in_place():
    after, moves = tell(JUDGING, MISSED)
    assert moves == [(100, "missed", "JUDGE", "COOLDOWN")]
    assert after == AutoNPOState(branch="auto-1", step=100, phase="COOLDOWN", until_step=140, num_interventions=1)


@pytest.mark.parametrize(("worse", "event", "branch"), [(False, "kept", "auto-1"), (True, "reverted", "main")])
def test_a_replay_may_be_judged(worse, event, branch):
    knobs = replace(CONTROL, accept_test=True)
    facts = [seen(99), seen(100), ReplayJudged(is_worse=worse, evidence={"difference": -0.1}, parent="main")]
    after, moves = tell(replace(REPLAYING, step=98), *facts, knobs=knobs)
    assert moves == [(100, "replayed", "REPLAY", "JUDGE"), (100, event, "JUDGE", "COOLDOWN")]
    # an attempt that was taken back was an attempt
    assert after == AutoNPOState(branch=branch, step=100, phase="COOLDOWN", until_step=140, num_interventions=1)


# Rest


@pytest.mark.parametrize(("cooldown", "first"), [(40, 141), (1, 102), (0, 101)])
def test_a_rest_is_that_many_steps_long_and_the_next_one_counts(cooldown, first):
    knobs = replace(CONTROL, cooldown=cooldown)
    state, _ = tell(replace(REPLAYING, step=99), seen(100), knobs=knobs)
    state, moves = tell(state, *(seen(step, "stagnant") for step in range(101, 150)), knobs=knobs)
    assert moves == [(first, "armed", "COOLDOWN", "TRAIN"), (first + 4, "warning", "TRAIN", "TRAIN")]


# The cap


def test_the_cap_is_told_once_a_warning():
    facts = [seen(step, "stagnant", has_checkpoint=step % 5 == 0) for step in range(101, 131)]
    state, moves = tell(
        replace(ARMED, num_interventions=3), *facts, seen(131), *(seen(s, "stagnant") for s in range(132, 137))
    )
    assert [move[:2] for move in moves] == [(105, "warning"), (105, "capped"), (136, "warning")]
    assert state.phase == "TRAIN"


def test_a_cap_of_nothing_never_triggers_and_no_cap_always_does():
    warned_at_checkpoint = seen(101, "stagnant", has_checkpoint=True)
    assert tell(WARNED, warned_at_checkpoint, knobs=replace(CONTROL, max_interventions=0))[0].phase == "TRAIN"
    many = replace(WARNED, num_interventions=99)
    assert tell(many, warned_at_checkpoint, knobs=replace(CONTROL, max_interventions=-1))[0].phase == "PROBE"


def test_a_cap_that_is_raised_lets_the_same_plateau_trigger():
    capped, _ = tell(replace(WARNED, num_interventions=3), seen(101, "stagnant", has_checkpoint=True))
    _, moves = tell(capped, seen(102, "stagnant", has_checkpoint=True), knobs=replace(CONTROL, max_interventions=4))
    assert [move[:2] for move in moves] == [(102, "warning"), (102, "trigger")]


# The early bootstrap


def test_an_early_bootstrap_comes_once_and_is_no_intervention():
    knobs = replace(CONTROL, early=True)
    state, moves = tell(START, *(seen(step) for step in range(1, 21)), knobs=knobs)
    assert moves == [(20, "early", "TRAIN", "GUIDE_GEN")]
    assert state == AutoNPOState(
        branch="main", step=20, phase="GUIDE_GEN", distance=20, has_tried_early=True, is_early=True
    )
    facts = [GUIDED, RollbackDone(branch="early", to_step=0, until_step=20), *(seen(step) for step in range(1, 62))]
    state, moves = tell(state, *facts, knobs=knobs)
    assert moves[2:] == [(20, "replayed", "REPLAY", "COOLDOWN"), (61, "armed", "COOLDOWN", "TRAIN")]
    assert state == AutoNPOState(branch="early", step=61, has_tried_early=True)


def test_a_rest_after_the_early_bootstrap_lasts_through_the_warm_up():
    knobs = replace(CONTROL, early=True, cooldown=0)
    state = AutoNPOState(branch="early", step=19, phase="REPLAY", until_step=20, has_tried_early=True, is_early=True)
    _, moves = tell(state, *(seen(step, "stagnant") for step in range(20, 46)), knobs=knobs)
    assert [move[:2] for move in moves] == [(20, "replayed"), (41, "armed"), (45, "warning")]


def test_early_begins_on_the_first_branch_alone():
    knobs = replace(CONTROL, early=True, early_scout=120)
    assert tell(replace(ARMED, num_interventions=1), seen(120), knobs=knobs)[1] == []
    assert tell(replace(ARMED, has_tried_early=True), seen(120), knobs=knobs)[1] == []
    assert tell(ARMED, seen(120), knobs=knobs)[1] == [(120, "early", "TRAIN", "GUIDE_GEN")]


# Facts that nobody waits for


@pytest.mark.parametrize(
    ("state", "fact"),
    [
        (ARMED, ACCEPTED),
        (ARMED, MISSED),
        (PROBING, GUIDED),
        (GUIDING, ACCEPTED),
        (GUIDING, ROLLED_BACK),
        (LEAVING, seen(101)),
        (REPLAYING, MISSED),
        (PROBING, seen(101)),
        (REPLAYING, ReplayJudged(is_worse=True, evidence={}, parent="main")),
        (ARMED, seen(100)),
    ],
)
def test_a_fact_that_does_not_fit_is_our_mistake(state, fact):
    with pytest.raises(AssertionError):
        advance(state, fact, knobs=CONTROL)


# Why a step did not trigger


@pytest.mark.parametrize(
    ("state", "fact", "word"),
    [
        (START, seen(1, "stagnant"), "warming_up"),
        (REPLAYING, seen(81, "stagnant"), "replaying"),
        (replace(ARMED, phase="COOLDOWN", until_step=140), seen(140, "stagnant"), "resting"),
        (replace(ARMED, phase="COOLDOWN", until_step=140), seen(141, "stagnant"), "streak"),
        (ARMED, seen(101, "no_signal"), "no_signal"),
        (ARMED, seen(101, "short_history"), "short_history"),
        (ARMED, seen(101, "rising"), "rising"),
        (ARMED, seen(101, "entropy_level"), "entropy_level"),
        (WARNED, seen(101, "stagnant"), "waiting"),
        (WARNED, seen(101, "no_signal"), "waiting"),
        (WARNED, seen(101, "rising"), "rising"),
        (replace(WARNED, num_interventions=3), seen(101, "stagnant", has_checkpoint=True), "capped"),
    ],
)
def test_a_step_that_does_not_trigger_says_why(state, fact, word):
    after, _ = tell(state, fact)
    assert explain_no_trigger(after, fact.reading, knobs=CONTROL) == word
