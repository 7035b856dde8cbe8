"""Whole stories of several interventions: restarted at every fact, and driven by arbitrary facts."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_cli.autonpo.controller import ControllerKnobs, advance
from npo_cli.autonpo.events import (
    ExtrapolationStarted,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayJudged,
    RollbackDone,
    StepObserved,
)
from npo_cli.autonpo.trigger import TriggerInput
from npo_cli.types.autonpo import AutoNPOState, ProbeResult, TriggerReading
from tests.autonpo.simulated_signals import CONTROL, GUIDED, REJECTED, START, UNGUIDED, SimulatedRun

DIAGRAM = {
    ("TRAIN", "PROBE"),
    ("TRAIN", "GUIDE_GEN"),
    ("TRAIN", "PUSH"),
    ("PUSH", "AHEAD"),
    ("PUSH", "PROBE"),
    ("AHEAD", "PROBE"),
    ("AHEAD", "COOLDOWN"),
    ("PROBE", "GUIDE_GEN"),
    ("PROBE", "COOLDOWN"),
    ("GUIDE_GEN", "ROLLBACK"),
    ("GUIDE_GEN", "COOLDOWN"),
    ("ROLLBACK", "REPLAY"),
    ("REPLAY", "COOLDOWN"),
    ("REPLAY", "JUDGE"),
    ("JUDGE", "COOLDOWN"),
    ("COOLDOWN", "TRAIN"),
}


def plateau(branch, step):
    """Reward stands still; entropy falls by 1 % a step and starts anew on every branch. One step in 16 is lost."""
    rng = Random(f"{branch} {step}")
    entropy = 0.3 * (1.2 if branch != "main" else 1.0) * 0.99**step * (1 + rng.gauss(0, 0.01))
    reward = None if rng.random() < 1 / 16 else 0.4 + rng.gauss(0, 0.05)
    return TriggerInput(step=step, reward=reward, entropy=entropy)


SHORT_REST = replace(CONTROL, cooldown=15, max_interventions=2)


@pytest.mark.parametrize(
    "story",
    [
        SimulatedRun(signal_at=plateau, control=SHORT_REST),
        SimulatedRun(signal_at=plateau, control=replace(SHORT_REST, early=True)),
        SimulatedRun(signal_at=plateau, control=replace(SHORT_REST, accept_test=True), is_worse=True),
    ],
    ids=["plain", "early", "reverted"],
)
def test_a_restart_anywhere_goes_on_as_if_nothing_had_happened(story):
    whole = list(story.go_on(START, last=200))
    events = [move.event for told in whole for move in told.moves]
    # the cap and the rests are met on the way, so they hold through restarts
    assert events.count("rolled_back") == 2 + story.control.early
    assert "capped" in events and events.count("armed") == 3
    for done, told in enumerate(whole, start=1):
        # Equal to the last bit: readings, moves and states.
        assert list(story.go_on(told.state, last=200)) == whole[done:]


def test_a_restart_from_the_last_written_move_comes_to_the_same_state():
    story = SimulatedRun(signal_at=plateau, control=SHORT_REST)
    whole = list(story.run(START, last=200))
    written = START
    for done, told in enumerate(whole, start=1):
        written = told.transitions[-1].state if told.transitions else written
        if told.state.step > written.step:
            *_, again = story.run(written, last=told.state.step)
            assert again == told, done


def test_rests_keep_interventions_apart():
    whole = list(SimulatedRun(signal_at=plateau, control=CONTROL).run(START, last=400))
    moves = [move for told in whole for move in told.transitions]
    ends = [move.step for move in moves if move.event == "replayed"]
    triggers = [move.step for move in moves if move.event == "trigger"]
    assert len(triggers) == 3 and len(ends) == 3
    # replayed at t: 40 steps of rest, and at least 5 to make a streak
    assert all(later - end >= 45 for end, later in zip(ends, triggers[1:], strict=False))


KNOBS = st.builds(
    ControllerKnobs,
    patience=st.integers(1, 4),
    warmup=st.integers(0, 6),
    cooldown=st.integers(0, 4),
    max_interventions=st.integers(-1, 3),
    early=st.booleans(),
    early_scout=st.integers(1, 8),
    accept_test=st.booleans(),
    push_steps=st.integers(0, 3),
)


def any_fact(data, state, knobs):
    """Some fact that fits the phase."""
    match state.phase:
        case "PUSH":
            pushed = ExtrapolationStarted(branch="ahead", until_step=state.step + knobs.push_steps)
            return data.draw(st.sampled_from([pushed, PrerequisiteMissing(what="gone")]))
        case "PROBE":
            distance = data.draw(st.integers(1, state.step))
            found = ProbeResult(is_accepted=True, reason="", distance=distance, strata=(), scores=())
            return data.draw(
                st.sampled_from([ProbeFinished(confirmation=found), REJECTED, PrerequisiteMissing(what="gone")])
            )
        case "GUIDE_GEN":
            return data.draw(st.sampled_from([GUIDED, UNGUIDED, PrerequisiteMissing(what="gone")]))
        case "ROLLBACK":
            return RollbackDone(branch="next", to_step=state.step - state.distance, until_step=state.step)
        case "JUDGE":
            return ReplayJudged(is_worse=data.draw(st.booleans()), evidence={}, parent="main")
    verdict = data.draw(st.sampled_from(["stagnant"] * 6 + ["rising", "no_signal", "short_history", "entropy_level"]))
    step = state.step + data.draw(st.integers(1, 3))
    reading = TriggerReading(step=step, verdict=verdict, reward=None, entropy=None)
    return StepObserved(reading=reading, has_checkpoint=data.draw(st.booleans()))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), knobs=KNOBS)
def test_the_cap_holds_and_phases_move_along_the_diagram(data, knobs):
    state = AutoNPOState(branch="main", step=0)
    for _ in range(40):
        before = state
        state, moves = advance(state, any_fact(data, state, knobs), knobs=knobs)
        phases = [before.phase, *(move.state.phase for move in moves)]
        assert {(a, b) for a, b in pairwise(phases) if a != b} <= DIAGRAM
        assert [move.phase_before for move in moves] == phases[:-1]
        assert (moves[-1].state if moves else state) == state
        assert moves or state.phase == before.phase
        assert knobs.max_interventions == -1 or state.num_interventions <= knobs.max_interventions
        # What belongs to a phase is there in it, and in no other.
        assert (state.until_step is not None) == (state.phase in ("AHEAD", "REPLAY", "COOLDOWN"))
        assert (state.distance is not None) == (state.phase in ("GUIDE_GEN", "ROLLBACK", "REPLAY", "JUDGE"))
        assert (state.stagnation_streak == 0 and not state.has_warned) or state.phase == "TRAIN"
        assert not state.has_warned or state.stagnation_streak >= knobs.patience
