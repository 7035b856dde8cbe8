"""The controller: one event at a time, whole simulated runs restarted at every event, and arbitrary events."""

from dataclasses import asdict, replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_cli.autonpo.controller import (
    PrerequisiteMissing,
    ProbeFinished,
    ReplayTested,
    RollbackDone,
    RunBegun,
    RungApplied,
    ScoutTrained,
    StepObserved,
    advance,
    explain_no_trigger,
    is_early_scout_due,
)
from npo_cli.autonpo.trigger import TriggerInput
from npo_cli.types.autonpo import AutoNPOState, ProbeResult, TriggerReading
from tests.autonpo.simulated_signals import (
    ACCEPTED,
    DEFAULTS,
    GUIDED,
    MISSING,
    REJECTED,
    START,
    UNGUIDED,
    SimulatedRun,
    autonpo_settings,
)

ARMED = AutoNPOState(branch="main", step=100)
WARNED = replace(ARMED, stagnation_streak=5, has_warned=True)
PROBING = replace(ARMED, phase="PROBE")
BUILDING = replace(ARMED, phase="GUIDE_GEN", distance=20)
ROLLING_BACK = replace(ARMED, phase="ROLLBACK", distance=20)
TESTING = AutoNPOState(branch="auto-1", step=100, phase="ACCEPTANCE_TEST", distance=20, num_interventions=1)
REPLAYING = AutoNPOState(branch="auto-1", step=80, phase="REPLAY", distance=20, until_step=100, num_interventions=1)
ROLLED_BACK = RollbackDone(branch="auto-1", to_step=80, until_step=100)


def observed(step, verdict="rising", *, has_checkpoint=False):
    value = None if verdict == "no_signal" else 0.3
    reading = TriggerReading(step=step, verdict=verdict, reward=value, entropy=value)
    return StepObserved(reading=reading, has_checkpoint=has_checkpoint)


def apply_events(state, *events, settings=DEFAULTS):
    """The state after all events, and the transitions as (step, event, phase before, phase after)."""
    rows = []
    for event in events:
        state, transitions = advance(state, event, settings)
        rows += [(one.step, one.event, one.phase_before, one.state.phase) for one in transitions]
        assert not transitions or transitions[-1].state == state
    return state, rows


# The streak


def test_streak_of_patience_steps_makes_one_warning():
    state, rows = apply_events(ARMED, *(observed(step, "stagnant") for step in range(101, 109)))
    assert rows == [(105, "warning", "TRAIN", "TRAIN")]
    assert (state.stagnation_streak, state.has_warned, state.step) == (8, True, 108)


@pytest.mark.parametrize("verdict", ["rising", "entropy_level"])
def test_streak_ends_at_a_step_without_both_signs(verdict):
    state, rows = apply_events(replace(ARMED, stagnation_streak=4), observed(101, verdict), observed(102, "stagnant"))
    assert (state.stagnation_streak, rows) == (1, [])


@pytest.mark.parametrize("verdict", ["no_signal", "short_history"])
def test_streak_is_unchanged_by_a_step_with_missing_values(verdict):
    state, rows = apply_events(replace(ARMED, stagnation_streak=4), observed(101, verdict), observed(102, "stagnant"))
    assert (state.stagnation_streak, rows) == (5, [(102, "warning", "TRAIN", "TRAIN")])


def test_warning_ends_when_the_run_recovers():
    state, rows = apply_events(WARNED, observed(101, "rising", has_checkpoint=True))
    assert rows == [(101, "recovered", "TRAIN", "TRAIN")]
    assert state == replace(ARMED, step=101)


def test_warmup_counts_for_no_streak():
    state, rows = apply_events(START, *(observed(step, "stagnant") for step in range(1, 45)))
    # 41 is the first step that counts: 41, 42, 43, 44
    assert (state.stagnation_streak, rows) == (4, [(41, "armed", "TRAIN", "TRAIN")])


def test_warmup_of_a_sparse_log_ends_at_the_first_step_beyond_it():
    _, rows = apply_events(START, observed(30), observed(55), observed(80))
    assert rows == [(55, "armed", "TRAIN", "TRAIN")]


# An intervention


def test_trigger_follows_a_warning_at_a_checkpoint_at_once():
    state, rows = apply_events(replace(ARMED, stagnation_streak=4), observed(101, "stagnant", has_checkpoint=True))
    assert rows == [(101, "warning", "TRAIN", "TRAIN"), (101, "trigger", "TRAIN", "PROBE")]
    assert state == AutoNPOState(branch="main", step=101, phase="PROBE")


def test_trigger_accepts_a_checkpoint_whose_metrics_are_missing():
    _, rows = apply_events(WARNED, observed(101, "stagnant"), observed(102, "no_signal", has_checkpoint=True))
    assert rows == [(102, "trigger", "TRAIN", "PROBE")]


def test_trigger_evidence_is_the_reading_and_the_streak():
    reading = TriggerReading(
        step=101, verdict="stagnant", reward=0.4, entropy=0.2, reward_gain=-0.01, reward_margin=0.02, entropy_drop=0.08
    )
    _, (transition,) = advance(WARNED, StepObserved(reading=reading, has_checkpoint=True), DEFAULTS)
    assert transition.evidence == {**{k: v for k, v in asdict(reading).items() if k != "step"}, "streak": 6}


def test_intervention_from_probe_to_cooldown():
    state, rows = apply_events(PROBING, ACCEPTED, GUIDED)
    assert rows == [(100, "probe_accepted", "PROBE", "GUIDE_GEN"), (100, "guide_built", "GUIDE_GEN", "ROLLBACK")]
    assert state == ROLLING_BACK
    # back to 80, and 81 ... 100 again
    state, rows = apply_events(state, ROLLED_BACK)
    assert rows == [(100, "rolled_back", "ROLLBACK", "REPLAY")]
    assert state == REPLAYING
    state, rows = apply_events(state, *(observed(step, "stagnant", has_checkpoint=True) for step in range(81, 101)))
    assert rows == [(100, "replay_done", "REPLAY", "COOLDOWN")]
    assert state == AutoNPOState(branch="auto-1", step=100, phase="COOLDOWN", until_step=140, num_interventions=1)


def test_evidence_of_each_action_is_plain_data():
    _, (accepted,) = advance(PROBING, ACCEPTED, DEFAULTS)
    assert accepted.evidence == asdict(ACCEPTED.result)
    _, (built,) = advance(BUILDING, GUIDED, DEFAULTS)
    assert built.evidence == {
        **{"guide": "auto-1", "num_prompts": 90, "num_prompts_with_rollouts": 30},
        **{"num_reused": 20, "num_tokens": 5000},
    }
    _, (back,) = advance(ROLLING_BACK, ROLLED_BACK, DEFAULTS)
    assert back.evidence == {
        **{"branch": "auto-1", "to_step": 80, "until_step": 100},
        **{"parent": "main", "is_early": False},
    }


@pytest.mark.parametrize(
    ("state", "event", "name"),
    [
        (PROBING, REJECTED, "probe_rejected"),
        (PROBING, MISSING, "prerequisite_missing"),
        (BUILDING, MISSING, "prerequisite_missing"),
        (ROLLING_BACK, MISSING, "prerequisite_missing"),
        (BUILDING, UNGUIDED, "guide_empty"),
    ],
)
def test_cooldown_follows_an_intervention_that_fails(state, event, name):
    after, rows = apply_events(state, event)
    assert rows == [(100, name, state.phase, "COOLDOWN")]
    rejections = int(name != "prerequisite_missing")
    assert after == AutoNPOState(
        branch="main",
        step=100,
        phase="COOLDOWN",
        until_step=140,
        num_rejections=rejections,
        num_interventions=int(name == "guide_empty"),
    )


def test_cooldown_doubles_with_each_rejection_in_a_row():
    state, until = PROBING, []
    for event in (REJECTED, MISSING, REJECTED, REJECTED):
        state, _ = apply_events(replace(state, phase="PROBE", until_step=None), event)
        until.append(state.until_step)
    # a missing checkpoint is no rejection: 40, 40, 80, 160
    assert (until, state.num_rejections) == ([140, 140, 180, 260], 3)
    # a replay that lasts ends the row; a rejected one counts
    replayed, _ = apply_events(replace(REPLAYING, step=99, num_rejections=3), observed(100))
    assert (replayed.until_step, replayed.num_rejections) == (140, 0)
    worse = ReplayTested(is_worse=True, evidence={}, parent="main")
    replayed, _ = apply_events(replace(TESTING, num_rejections=1), worse)
    assert (replayed.until_step, replayed.num_rejections) == (180, 2)


def test_acceptance_test_without_its_prerequisites_keeps_the_replay():
    after, rows = apply_events(TESTING, MISSING)
    assert rows == [(100, "prerequisite_missing", "ACCEPTANCE_TEST", "COOLDOWN")]
    assert after == AutoNPOState(branch="auto-1", step=100, phase="COOLDOWN", until_step=140, num_interventions=1)


@pytest.mark.parametrize(
    ("is_worse", "name", "branch"), [(False, "replay_accepted", "auto-1"), (True, "replay_rejected", "main")]
)
def test_acceptance_test_keeps_or_rejects_the_replay(is_worse, name, branch):
    tested = ReplayTested(is_worse=is_worse, evidence={"difference": -0.1}, parent="main")
    after, rows = apply_events(
        replace(REPLAYING, step=98),
        *(observed(99), observed(100), tested),
        settings=autonpo_settings(replay={"acceptance_test": True}),
    )
    assert rows == [
        (100, "replay_done", "REPLAY", "ACCEPTANCE_TEST"),
        (100, name, "ACCEPTANCE_TEST", "COOLDOWN"),
    ]
    # a rejected replay counts as an intervention
    assert after == AutoNPOState(
        branch=branch, step=100, phase="COOLDOWN", until_step=140, num_interventions=1, num_rejections=int(is_worse)
    )


# Cooldown and limit


@pytest.mark.parametrize(("cooldown", "first"), [(40, 141), (1, 102), (0, 101)])
def test_cooldown_has_its_length_and_the_next_step_counts(cooldown, first):
    short = autonpo_settings(trigger={"cooldown_steps": cooldown})
    state, _ = apply_events(replace(REPLAYING, step=99), observed(100), settings=short)
    state, rows = apply_events(state, *(observed(step, "stagnant") for step in range(101, 150)), settings=short)
    assert rows == [(first, "armed", "COOLDOWN", "TRAIN"), (first + 4, "warning", "TRAIN", "TRAIN")]


def test_limit_is_reported_once_per_warning():
    steps = [observed(step, "stagnant", has_checkpoint=step % 5 == 0) for step in range(101, 131)]
    again = [observed(131), *(observed(step, "stagnant") for step in range(132, 137))]
    state, rows = apply_events(replace(ARMED, num_interventions=3), *steps, *again)
    assert [row[:2] for row in rows] == [(105, "warning"), (105, "limit_reached"), (136, "warning")]
    assert state.phase == "TRAIN"


def test_limit_of_zero_never_triggers_and_no_limit_always_does():
    event = observed(101, "stagnant", has_checkpoint=True)
    assert apply_events(WARNED, event, settings=autonpo_settings(max_interventions=0))[0].phase == "TRAIN"
    many = replace(WARNED, num_interventions=99)
    assert apply_events(many, event, settings=autonpo_settings(max_interventions=-1))[0].phase == "PROBE"


def test_limit_that_is_raised_lets_the_same_plateau_trigger():
    limited, _ = apply_events(replace(WARNED, num_interventions=3), observed(101, "stagnant", has_checkpoint=True))
    _, rows = apply_events(
        limited, observed(102, "stagnant", has_checkpoint=True), settings=autonpo_settings(max_interventions=4)
    )
    assert [row[:2] for row in rows] == [(102, "warning"), (102, "trigger")]


# Early bootstrap


def test_early_bootstrap_happens_once_and_is_not_counted_as_an_intervention():
    early = autonpo_settings(early={"enabled": True})
    state, rows = apply_events(START, *(observed(step) for step in range(1, 21)), settings=early)
    assert rows == [(20, "early_bootstrap", "TRAIN", "PROBE")]
    assert state == AutoNPOState(
        branch="main", step=20, phase="PROBE", distance=20, has_tried_early=True, is_early=True
    )
    back = RollbackDone(branch="early", to_step=0, until_step=20)
    events = (ACCEPTED, GUIDED, back, *(observed(step) for step in range(1, 62)))
    state, rows = apply_events(state, *events, settings=early)
    assert rows[3:] == [(20, "replay_done", "REPLAY", "COOLDOWN"), (61, "armed", "COOLDOWN", "TRAIN")]
    assert state == AutoNPOState(branch="early", step=61, has_tried_early=True)


def test_early_bootstrap_cooldown_lasts_through_the_warmup():
    early = autonpo_settings(early={"enabled": True}, trigger={"cooldown_steps": 0})
    state = AutoNPOState(branch="early", step=19, phase="REPLAY", until_step=20, has_tried_early=True, is_early=True)
    _, rows = apply_events(state, *(observed(step, "stagnant") for step in range(20, 46)), settings=early)
    assert [row[:2] for row in rows] == [(20, "replay_done"), (41, "armed"), (45, "warning")]


def test_early_bootstrap_happens_on_the_first_branch_only():
    early = autonpo_settings(early={"enabled": True, "scout_steps": 120})
    assert apply_events(replace(ARMED, num_interventions=1), observed(120), settings=early)[1] == []
    assert apply_events(replace(ARMED, has_tried_early=True), observed(120), settings=early)[1] == []
    assert apply_events(ARMED, observed(120), settings=early)[1] == [(120, "early_bootstrap", "TRAIN", "PROBE")]


# Events that do not fit the phase


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (ARMED, ACCEPTED),
        (ARMED, MISSING),
        (PROBING, GUIDED),
        (BUILDING, ACCEPTED),
        (BUILDING, ROLLED_BACK),
        (ROLLING_BACK, observed(101)),
        (REPLAYING, MISSING),
        (PROBING, observed(101)),
        (REPLAYING, ReplayTested(is_worse=True, evidence={}, parent="main")),
        (ARMED, observed(100)),
    ],
)
def test_event_that_does_not_fit_the_phase_is_a_bug(state, event):
    with pytest.raises(AssertionError):
        advance(state, event, DEFAULTS)


# Why a step did not trigger


@pytest.mark.parametrize(
    ("state", "event", "reason"),
    [
        (START, observed(1, "stagnant"), "warmup"),
        (REPLAYING, observed(81, "stagnant"), "replay"),
        (replace(ARMED, phase="COOLDOWN", until_step=140), observed(140, "stagnant"), "cooldown"),
        (replace(ARMED, phase="COOLDOWN", until_step=140), observed(141, "stagnant"), "short_streak"),
        (ARMED, observed(101, "no_signal"), "no_signal"),
        (ARMED, observed(101, "short_history"), "short_history"),
        (ARMED, observed(101, "rising"), "rising"),
        (ARMED, observed(101, "entropy_level"), "entropy_level"),
        (WARNED, observed(101, "stagnant"), "no_checkpoint"),
        (WARNED, observed(101, "no_signal"), "no_checkpoint"),
        (WARNED, observed(101, "rising"), "rising"),
        (replace(WARNED, num_interventions=3), observed(101, "stagnant", has_checkpoint=True), "limit_reached"),
    ],
)
def test_step_without_a_trigger_has_a_reason(state, event, reason):
    after, _ = apply_events(state, event)
    assert explain_no_trigger(after, event.reading, DEFAULTS) == reason


# Whole runs

DIAGRAM = {
    ("TRAIN", "SCOUT"),
    ("SCOUT", "APPLY"),
    ("SCOUT", "COOLDOWN"),
    ("APPLY", "WINDOW"),
    ("APPLY", "COOLDOWN"),
    ("WINDOW", "COOLDOWN"),
    ("TRAIN", "PROBE"),
    ("TRAIN", "GUIDE_GEN"),
    ("PROBE", "GUIDE_GEN"),
    ("PROBE", "COOLDOWN"),
    ("GUIDE_GEN", "ROLLBACK"),
    ("GUIDE_GEN", "COOLDOWN"),
    ("ROLLBACK", "REPLAY"),
    ("REPLAY", "COOLDOWN"),
    ("REPLAY", "ACCEPTANCE_TEST"),
    ("ACCEPTANCE_TEST", "COOLDOWN"),
    ("COOLDOWN", "TRAIN"),
}


def plateau(branch, step):
    """Constant reward; entropy falls by 1 % per step and starts again on every branch. One step in 16 is missing."""
    rng = Random(f"{branch} {step}")
    entropy = 0.3 * (1.2 if branch != "main" else 1.0) * 0.99**step * (1 + rng.gauss(0, 0.01))
    reward = None if rng.random() < 1 / 16 else 0.4 + rng.gauss(0, 0.05)
    return TriggerInput(step=step, reward=reward, entropy=entropy)


SHORT = {"trigger": {"cooldown_steps": 15}, "max_interventions": 2}


@pytest.mark.parametrize(
    "run",
    [
        SimulatedRun(signal_at=plateau, settings=autonpo_settings(**SHORT)),
        pytest.param(
            SimulatedRun(signal_at=plateau, settings=autonpo_settings(**SHORT, early={"enabled": True})),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SimulatedRun(
                signal_at=plateau, settings=autonpo_settings(**SHORT, replay={"acceptance_test": True}), is_worse=True
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["default", "early", "replay rejected"],
)
def test_controller_restarted_after_any_event_continues_the_same(run):
    whole = list(run.run(START, last=200))
    events = [transition.event for step in whole for transition in step.transitions]
    early = run.settings.early.enabled
    assert events.count("trigger") == 2 and events.count("early_bootstrap") == early
    assert "limit_reached" in events and events.count("armed") == 3
    for done, step in enumerate(whole, start=1):
        # Equal to the last bit: readings, transitions and states.
        assert list(run.run(step.state, last=200)) == whole[done:]


def test_controller_restarted_from_the_last_saved_transition_reaches_the_same_state():
    run = SimulatedRun(signal_at=plateau, settings=autonpo_settings(**SHORT))
    saved = START
    for step in run.run(START, last=200):
        saved = step.transitions[-1].state if step.transitions else saved
        if step.state.step > saved.step:
            *_, again = run.run(saved, last=step.state.step)
            assert again == step


def test_cooldown_separates_interventions():
    whole = list(SimulatedRun(signal_at=plateau, settings=DEFAULTS).run(START, last=400))
    transitions = [transition for step in whole for transition in step.transitions]
    ends = [transition.step for transition in transitions if transition.event == "replay_done"]
    triggers = [transition.step for transition in transitions if transition.event == "trigger"]
    assert len(triggers) == 3 and len(ends) == 3
    # after the replay: 40 steps of cooldown, and at least 5 to make a streak
    assert all(later - end >= 45 for end, later in zip(ends, triggers[1:], strict=False))


SETTINGS = st.builds(
    lambda trigger, early, replay, limit: autonpo_settings(
        trigger=trigger, early=early, replay=replay, max_interventions=limit
    ),
    st.fixed_dictionaries(
        {"patience": st.integers(1, 4), "warmup_steps": st.integers(0, 6), "cooldown_steps": st.integers(0, 4)}
    ),
    st.fixed_dictionaries(
        {
            "enabled": st.booleans(),
            "scout": st.sampled_from(["run", "disposable"]),
            "scout_steps": st.integers(1, 8),
        }
    ),
    st.fixed_dictionaries({"acceptance_test": st.booleans()}),
    st.integers(-1, 3),
)


def draw_event(data, state, config):
    """An event that fits the phase."""
    missing = PrerequisiteMissing(reason="gone")
    if is_early_scout_due(state, config):
        return RunBegun()
    match state.phase:
        case "SCOUT":
            trained = ScoutTrained(scout="early-scout", scout_step=4, num_steps=4, num_tokens=9)
            return data.draw(st.sampled_from([trained, missing]))
        case "APPLY":
            applied = RungApplied(branch="early", to_step=0, until_step=3, settings=(), undo={}, guide=None)
            return data.draw(st.sampled_from([applied, missing]))
        case "PROBE":
            distance = data.draw(st.integers(1, state.step))
            result = ProbeResult(is_accepted=True, reason="", distance=distance, strata=(), scores=())
            return data.draw(st.sampled_from([ProbeFinished(result=result), REJECTED, missing]))
        case "GUIDE_GEN":
            return data.draw(st.sampled_from([GUIDED, UNGUIDED, missing]))
        case "ROLLBACK":
            return RollbackDone(branch="next", to_step=state.step - state.distance, until_step=state.step)
        case "ACCEPTANCE_TEST":
            return ReplayTested(is_worse=data.draw(st.booleans()), evidence={}, parent="main")
    verdict = data.draw(st.sampled_from(["stagnant"] * 6 + ["rising", "no_signal", "short_history", "entropy_level"]))
    step = state.step + data.draw(st.integers(1, 3))
    reading = TriggerReading(step=step, verdict=verdict, reward=None, entropy=None)
    return StepObserved(reading=reading, has_checkpoint=data.draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), config=SETTINGS)
def test_controller_keeps_to_diagram_and_limit_for_arbitrary_events(data, config):
    state = AutoNPOState(branch="main", step=0)
    for _ in range(40):
        before = state
        state, transitions = advance(state, draw_event(data, state, config), config)
        phases = [before.phase, *(transition.state.phase for transition in transitions)]
        assert {(a, b) for a, b in pairwise(phases) if a != b} <= DIAGRAM
        assert [transition.phase_before for transition in transitions] == phases[:-1]
        assert (transitions[-1].state if transitions else state) == state
        assert transitions or state.phase == before.phase
        assert config.max_interventions == -1 or state.num_interventions <= config.max_interventions
        # What belongs to a phase is set in it, and in no other.
        assert (state.until_step is not None) == (state.phase in ("REPLAY", "WINDOW", "COOLDOWN"))
        assert (state.rung is None) or state.phase in ("SCOUT", "APPLY", "WINDOW", "COOLDOWN")
        with_distance = ("GUIDE_GEN", "ROLLBACK", "REPLAY", "ACCEPTANCE_TEST", *(["PROBE"] if state.is_early else []))
        assert (state.distance is not None) == (state.phase in with_distance)
        assert (state.stagnation_streak == 0 and not state.has_warned) or state.phase == "TRAIN"
        assert not state.has_warned or state.stagnation_streak >= config.trigger.patience
