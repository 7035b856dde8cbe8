"""The ladder: which rung a trigger leads to, what is forecast of it, and what it was worth by the record."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from npo_cli.autonpo.controller import (
    RunBegun,
    RungApplied,
    RungForecasted,
    ScoutTrained,
    StepObserved,
    advance,
    is_early_scout_due,
    is_effect_due,
)
from npo_cli.autonpo.dry_run import RecordedRun, simulate_autonpo
from npo_cli.autonpo.dry_training import plan_interventions
from npo_cli.autonpo.preflight import validate_autonpo_settings
from npo_cli.autonpo.rung_effect import compare_with_trend, estimate_rate, forecast_rung
from npo_cli.config.loading import load_recipe
from npo_cli.errors import NpoError
from npo_cli.registry import RUNGS
from npo_cli.report.tables_autonpo import describe_evidence, rung_tables
from npo_cli.storage.autonpo_log import append_transitions, autonpo_path, read_transitions
from npo_cli.storage.layout import RunDir
from npo_cli.types.autonpo import AutoNPOState, RungEffect, RungForecast, Transition, TriggerReading
from tests.autonpo.simulated_signals import ACCEPTED, GUIDED, MISSING, REJECTED, autonpo_settings, curve

FULL = autonpo_settings(ladder=["mistakes", "token_weight", "guide", "dense", "rollback"])
EARLY_SCOUT = ("autonpo.early.enabled=true", "autonpo.early.scout=disposable")
ARMED = AutoNPOState(branch="main", step=100)
WARNED = replace(ARMED, stagnation_streak=5, has_warned=True)
APPLIED = RungApplied(
    branch="auto-1",
    to_step=101,
    until_step=121,
    settings=("order.mistakes=0.5",),
    undo={"order.mistakes": 0.0},
    guide=None,
)


def observed(step, *, effect=None, verdict="rising"):
    reading = TriggerReading(step=step, verdict=verdict, reward=0.3, entropy=0.3)
    return StepObserved(reading=reading, has_checkpoint=True, effect=effect)


def forecast(rung, value, *, reason=None):
    basis = "unavailable" if value is None else "untried"
    reason = ("" if value is not None and value >= 1 else "no") if reason is None else reason
    return RungForecasted(forecast=RungForecast(rung=rung, basis=basis, value=value, reason=reason))


def effect_of(rung, value, *, half=0.5):
    numbers = dict.fromkeys(RungEffect.__slots__, 0.0)
    named = {"rung": rung, "num_before": 9, "num_after": 3, "cost": 20.0, "value": value}
    return RungEffect(**{**numbers, **named, "value_low": value - half, "value_high": value + half})


def apply_events(state, *events, settings=FULL):
    """The state after all events, and the transitions as (event, phase after, rung after)."""
    rows = []
    for event in events:
        state, transitions = advance(state, event, settings)
        rows += [(one.event, one.state.phase, one.state.rung) for one in transitions]
    return state, rows


# The controller


def test_trigger_considers_the_rungs_in_their_order():
    state, rows = apply_events(
        WARNED,
        observed(101, verdict="stagnant"),
        forecast("mistakes", 0.9),
        forecast("token_weight", None),
        forecast("guide", 0.5),
        REJECTED,
        REJECTED,
    )
    assert rows == [
        ("trigger", "FORECAST", "mistakes"),
        ("rung_refused", "FORECAST", "token_weight"),
        ("rung_refused", "FORECAST", "guide"),
        ("rung_refused", "PROBE", "dense"),
        ("probe_rejected", "PROBE", "rollback"),
        ("probe_rejected", "COOLDOWN", None),
    ]
    # what was not available does not wait, so one cooldown is enough
    assert (state.until_step, state.num_rejections, state.num_interventions) == (141, 0, 0)
    assert state.refusals == {"mistakes": 1, "guide": 1, "dense": 1, "rollback": 1}
    assert state.waits == dict.fromkeys(("mistakes", "guide", "dense", "rollback"), 141)


def test_chosen_rung_has_a_window_then_a_cooldown_in_which_it_is_measured():
    state, rows = apply_events(WARNED, observed(101, verdict="stagnant"), forecast("mistakes", 1.0), APPLIED)
    assert rows[1:] == [("rung_chosen", "APPLY", "mistakes"), ("rung_applied", "WINDOW", "mistakes")]
    window = AutoNPOState(
        branch="auto-1", step=101, phase="WINDOW", until_step=121, rung="mistakes", num_interventions=1
    )
    assert state == window
    state, rows = apply_events(state, *(observed(step, verdict="stagnant") for step in range(102, 161)))
    assert rows == [("window_done", "COOLDOWN", "mistakes")]
    assert (state.step, state.until_step) == (160, 161)
    assert is_effect_due(state, 161)
    assert not is_effect_due(state, 160)
    state, rows = apply_events(state, observed(161, effect=effect_of("mistakes", 1.2)), observed(162))
    assert rows == [("rung_measured", "COOLDOWN", None), ("armed", "TRAIN", None)]
    assert state == AutoNPOState(branch="auto-1", step=162, num_interventions=1)


def test_rung_that_did_not_pay_waits_and_the_next_one_is_considered():
    cooling = AutoNPOState(branch="auto-1", step=160, phase="COOLDOWN", until_step=161, rung="mistakes")
    state, _ = apply_events(cooling, observed(161, effect=effect_of("mistakes", 0.8)), observed(162))
    assert (state.refusals, state.waits) == ({"mistakes": 1}, {"mistakes": 201})
    warned = replace(state, stagnation_streak=5, has_warned=True)
    assert apply_events(replace(warned, step=199), observed(201, verdict="stagnant"))[0].rung == "token_weight"
    assert apply_events(replace(warned, step=199), observed(202, verdict="stagnant"))[0].rung == "mistakes"
    # the second time in a row for twice as long; a rung that pays ends the row
    again, _ = apply_events(replace(cooling, refusals={"mistakes": 1}), observed(161, effect=effect_of("mistakes", 0)))
    assert again.waits == {"mistakes": 161 + 80}
    paid, _ = apply_events(replace(cooling, refusals={"mistakes": 1}), observed(161, effect=effect_of("mistakes", 1)))
    assert paid.refusals == {}


def test_cooldown_lasts_until_a_rung_may_be_considered_again():
    two = autonpo_settings(ladder=["guide", "rollback"])
    state = AutoNPOState(branch="main", step=100, phase="PROBE", rung="rollback", refusals={"rollback": 1})
    # guide until 170; rollback, refused a second time, until 180
    state, rows = apply_events(replace(state, waits={"guide": 170}), REJECTED, settings=two)
    assert rows == [("probe_rejected", "COOLDOWN", None)]
    assert (state.waits, state.until_step) == ({"guide": 170, "rollback": 180}, 170)
    waiting = replace(WARNED, waits={"guide": 170, "rollback": 180})
    state, rows = apply_events(waiting, observed(101, verdict="stagnant"), settings=two)
    assert rows == [("trigger", "COOLDOWN", None)]
    assert state.until_step == 170


def test_dense_rung_is_applied_after_its_probe_and_the_rollback_builds_a_guide():
    probing = AutoNPOState(branch="main", step=100, phase="PROBE", rung="dense")
    state, rows = apply_events(probing, ACCEPTED, replace(APPLIED, to_step=80, until_step=90))
    assert rows == [("probe_accepted", "APPLY", "dense"), ("rung_applied", "WINDOW", "dense")]
    assert (state.step, state.distance, state.until_step) == (80, 20, 90)
    _, rows = apply_events(replace(probing, rung="rollback"), ACCEPTED, GUIDED)
    assert rows == [("probe_accepted", "GUIDE_GEN", "rollback"), ("guide_built", "ROLLBACK", "rollback")]


def test_chosen_scout_is_trained_before_its_rung_is_applied():
    considered = replace(ARMED, phase="FORECAST", rung="scout")
    trained = ScoutTrained(scout="auto-1-scout", scout_step=120, num_steps=20, num_tokens=9)
    _, rows = apply_events(considered, forecast("scout", 1.0), trained, APPLIED)
    assert rows == [
        ("rung_chosen", "SCOUT", "scout"),
        ("scout_trained", "APPLY", "scout"),
        ("rung_applied", "WINDOW", "scout"),
    ]


def test_early_scout_comes_once_before_the_first_step_and_is_not_counted():
    early = autonpo_settings(early={"enabled": True, "scout": "disposable"})
    begun = AutoNPOState(branch="main", step=0)
    assert is_early_scout_due(begun, early)
    assert not is_early_scout_due(begun, autonpo_settings(early={"enabled": True}))
    trained = ScoutTrained(scout="early-scout", scout_step=20, num_steps=20, num_tokens=9)
    applied = replace(APPLIED, branch="early", to_step=0, until_step=20)
    steps = (observed(step, verdict="stagnant") for step in range(1, 64))
    state, rows = apply_events(begun, RunBegun(), trained, applied, *steps, settings=early)
    assert rows[:4] == [
        ("early_bootstrap", "SCOUT", "scout"),
        ("scout_trained", "APPLY", "scout"),
        ("rung_applied", "WINDOW", "scout"),
        ("window_done", "COOLDOWN", "scout"),
    ]
    assert rows[4:] == [("armed", "TRAIN", None)]
    assert state == AutoNPOState(branch="early", step=63, stagnation_streak=3, has_tried_early=True)
    assert not is_early_scout_due(replace(state, step=0), early)


@pytest.mark.parametrize("phase", ["FORECAST", "SCOUT", "APPLY"])
def test_cooldown_follows_a_rung_with_a_missing_prerequisite(phase):
    state, rows = apply_events(replace(ARMED, phase=phase, rung="guide"), MISSING)
    assert rows == [("prerequisite_missing", "COOLDOWN", None)]
    assert (state.until_step, state.waits) == (140, {})


def test_windows_count_towards_the_limit_of_interventions():
    event = observed(101, verdict="stagnant")
    _, rows = apply_events(replace(WARNED, num_interventions=3), event)
    assert rows == [("limit_reached", "TRAIN", None)]


def test_ladder_fields_are_on_disk_only_where_they_hold_something(tmp_path):
    run = RunDir(tmp_path)
    states = [ARMED, replace(ARMED, phase="FORECAST", rung="guide", refusals={"dense": 2}, waits={"dense": 180})]
    append_transitions(run, [Transition(step=100, event="armed", phase_before="TRAIN", state=one) for one in states])
    first, second = autonpo_path(run).read_text().splitlines()
    assert "rung" not in first
    assert '"waits"' in second
    assert [one.state for one in read_transitions(run)] == states


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("autonpo.ladder=[mistakes,mistakes]",), "must not name a rung twice"),
        (("autonpo.ladder=[mistake]",), "did you mean mistakes"),
        (("autonpo.ladder=[]",), "autonpo.ladder"),
    ],
)
def test_ladder_with_unknown_repeated_or_no_rungs_is_refused(settings, message):
    with pytest.raises(NpoError) as caught:
        load_recipe("micro-auto", settings)
    assert message in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("autonpo.ladder=[guide]", "train.staleness=1"), "not available with train.staleness above 0"),
        (("autonpo.ladder=[dense]", "guide.experience.replay_fraction=0.5"), "autonpo.ladder has dense"),
        (("autonpo.ladder=[guide]", "guide.source=extrapolated"), "switches guide.source on"),
        (("autonpo.ladder=[mistakes]", "order.mistakes=0.2"), "switches order.mistakes on for a window, but it is 0.2"),
        (("autonpo.ladder=[guide]", "autonpo.rungs.guide=nothing"), "nothing"),
        (("autonpo.ladder=[scout]", "train.staleness=1"), "has scout, whose scout is not available with train.stal"),
        (("autonpo.ladder=[scout]", "scout.lora.rank=2"), "scout.lora.rank is not available"),
        (("autonpo.ladder=[scout]", "guide.experience.replay_fraction=0.5"), "autonpo.ladder has scout"),
        ((*EARLY_SCOUT, "train.staleness=1"), "autonpo.early.scout is disposable, whose scout is not available"),
        ((*EARLY_SCOUT, "scout.lora.rank=2"), "autonpo.early.scout is disposable"),
        ((*EARLY_SCOUT, "autonpo.early.replay_steps=261"), "the run has only 260 steps"),
        (("autonpo.ladder=[mistakes]", "autonpo.trigger.cooldown_steps=0"), "measured in its cooldown"),
    ],
)
def test_rung_that_could_never_be_applied_is_refused(settings, message):
    with pytest.raises(NpoError, match=message):
        validate_autonpo_settings(load_recipe("micro-auto", settings), 4000)


def test_every_built_in_rung_fits_the_shipped_recipe():
    ladder = "autonpo.ladder=[mistakes,token_weight,guide,scout,dense]"
    validate_autonpo_settings(load_recipe("micro-auto", (ladder, *EARLY_SCOUT)), 4000)
    assert {name for name in RUNGS.built_in if not RUNGS.get(name).has_window} == {"rollback"}


# Effect and forecast


def test_deviation_from_a_trend_equals_the_regression_with_an_indicator():
    """One new point: its deviation is the coefficient of its own indicator, with n - 2 degrees of freedom."""
    rng = np.random.default_rng(0)
    x_N, y_N = np.arange(-11.0, 1.0), rng.normal(0.5, 0.1, 12)
    design = np.column_stack([np.ones(13), np.append(x_N, 7.0), np.eye(13)[:, 12]])
    values = np.append(y_N, 0.9)
    coefficients, (residual,), *_ = np.linalg.lstsq(design, values, rcond=None)
    half = stats.t.ppf(0.975, 10) * np.sqrt(residual / 10 * np.linalg.inv(design.T @ design)[2, 2])
    found = compare_with_trend(list(zip(x_N, y_N, strict=True)), [(7.0, 0.9)])
    assert found.mean == 0.9
    assert (found.difference, found.high - found.difference) == pytest.approx((coefficients[2], half))
    assert found.difference - found.low == pytest.approx(half)


def test_interval_of_a_deviation_covers_no_effect_at_its_level():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        y_N = 0.3 + 0.004 * np.arange(60) + rng.normal(0, 0.08, 60)
        found = compare_with_trend(list(zip(range(40), y_N[:40], strict=True)), list(enumerate(y_N[40:], start=40)))
        covered += found.low <= 0 <= found.high
    # 0.95 +- 3 standard errors of 400 trials
    assert 0.917 <= covered / 400 <= 0.983


def test_rate_is_the_gain_between_both_ends_of_the_line():
    # means .15 and .55 of two steps each, four steps apart
    assert estimate_rate([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2, rollouts_per_step=10) == pytest.approx(0.1)
    # no gain: one correct rollout more in 6 steps of 10
    assert estimate_rate([0.4] * 6, 2, rollouts_per_step=10) == pytest.approx(1 / 60)


def measured(rung, value, half):
    evidence = asdict(effect_of(rung, value, half=half))
    return Transition(step=1, event="rung_measured", phase_before="COOLDOWN", state=ARMED, evidence=evidence)


def test_forecast_of_an_untried_rung_is_break_even():
    found = forecast_rung("guide", [measured("mistakes", 0.2, 0.5)])
    assert (found.basis, found.value, found.is_taken) == ("untried", 1.0, True)


def test_forecast_is_the_mean_of_measured_values_by_precision():
    # weights 4 and 1: (4 x 0.8 + 1 x 1.3) / 5 = 0.9; half width 1 / sqrt(4 + 1)
    found = forecast_rung("guide", [measured("guide", 0.8, 0.5), measured("guide", 1.3, 1.0)])
    assert (found.num_measured, found.is_taken) == (2, False)
    assert (found.value, found.value_high) == pytest.approx((0.9, 0.9 + 5**-0.5))
    assert "it was worth 0.90 steps per step" in found.reason


def test_table_of_rungs_has_forecast_effect_and_value():
    state = replace(ARMED, rung="mistakes")
    chosen = asdict(RungForecast(rung="mistakes", basis="untried", value=1.0))
    moves = [
        Transition(step=101, event="rung_chosen", phase_before="FORECAST", state=state, evidence=chosen),
        Transition(step=101, event="rung_applied", phase_before="APPLY", state=state, evidence=asdict(APPLIED)),
        measured("mistakes", 1.25, 0.5),
    ]
    (table,) = rung_tables(moves)
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert (cells["step"], cells["rung"], cells["window"], cells["cost"]) == ("101", "mistakes", "102-121", "20.0")
    assert cells["value"].startswith("1.25")
    assert cells["forecast"] == "untried"
    (short,) = rung_tables(moves, is_short=True)
    assert (short.header, short.rows[0][1]) == (("step", "rung", "window", "cost", "value"), "mistakes")
    assert rung_tables([]) == ()


# The simulation


def test_simulated_ladder_takes_each_rung_once_and_then_the_rollback():
    """Constant reward, entropy that falls by 1 % per step: a trigger at the first checkpoint after every cooldown."""
    signals = curve(lambda step: 0.5, lambda step: 0.99**step, last=600, noise=(0, 0), seed=0)
    recipe = load_recipe("micro", ("autonpo.ladder=[mistakes,guide,dense,rollback]", "autonpo.max_interventions=-1"))
    record = RecordedRun(
        source=Path("log.jsonl"), run=None, branch="-", recipe=recipe, save_every=10, trigger_inputs=tuple(signals)
    )
    found = simulate_autonpo(record)
    made = [
        (one.step, one.state.rung, one.state.step, one.state.until_step)
        for one in found.transitions
        if one.event in ("rung_applied", "rolled_back")
    ]
    # warning at 45; windows of 20 steps and cooldowns of 40; dense by 10 steps, the rollback by 80
    assert made[:4] == [
        (50, "mistakes", 50, 70),
        (120, "guide", 120, 140),
        (190, "dense", 180, 190),
        (240, "rollback", 160, 240),
    ]
    assert {reason for _, reason in found.reasons} == {"warmup", "short_streak", "no_checkpoint", "window", "cooldown"}
    text = "".join(describe_evidence(one) for one in found.transitions)
    assert "assumed: mistakes" in text


def test_simulated_early_scout_has_its_window_in_the_first_recorded_steps():
    signals = curve(lambda step: 0.5, lambda step: 1.0, last=70, noise=(0, 0), seed=0)
    recipe = load_recipe("micro", (*EARLY_SCOUT, "autonpo.ladder=[scout,rollback]"))
    record = RecordedRun(
        source=Path("log.jsonl"), run=None, branch="-", recipe=recipe, save_every=10, trigger_inputs=tuple(signals)
    )
    found = simulate_autonpo(record)
    made = [(one.step, one.event, one.state.until_step) for one in found.transitions]
    assert made == [
        *((0, "started", None), (0, "early_bootstrap", None), (0, "scout_trained", None), (0, "rung_applied", 20)),
        *((20, "window_done", 60), (61, "armed", None)),
    ]
    assert describe_evidence(found.transitions[1]) == "scout of 20 steps from step 0"
    assert describe_evidence(found.transitions[2]) == "assumed: 20 steps"


def test_dry_run_counts_what_each_rung_may_add():
    ladder = "autonpo.ladder=[mistakes,guide,scout,dense,rollback]"
    settings = (ladder, "scout.group_size=4", "train.prompts_per_step=16", "train.save_every=10")
    rows = [one for one in plan_interventions(load_recipe("micro", settings), mean_length=None) if hasattr(one, "work")]
    # windows of 20 steps of 16 prompts: 8 guide samples each, or 2 rollouts each; 20 steps of a scout
    assert {row.work: (row.prompts, row.samples) for row in rows[:5]} == {
        "an intervention: probe": (256, 1024),
        "a window: mistakes": (0, 0),
        "a window: guide": (320, 2560),
        "a window: scout": (320, 1280),
        "a window: dense": (320, 640),
    }
