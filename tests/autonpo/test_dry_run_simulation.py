"""The rehearsed controller, on records whose every move can be worked out by hand (see recordings.py)."""

from pathlib import Path

import pytest

from npo_cli.autonpo.controller import advance
from npo_cli.autonpo.dry_run import RecordedRun, load_file_record, load_run_record, merge_reasons, simulate_autonpo
from npo_cli.autonpo.events import StepObserved
from npo_cli.autonpo.preflight import controller_knobs, trigger_knobs
from npo_cli.autonpo.trainer_logs import LogColumns
from npo_cli.autonpo.trigger import Trigger
from npo_cli.errors import NpoError
from npo_cli.types.autonpo import AutoNPOState, NonTriggerSpan, Transition
from tests.helpers.recorded_metrics import (
    SENSITIVE_TRIGGER,
    append_metrics,
    constant_reward_rows,
    make_run,
    write_metrics_file,
)
from tests.storage.builders import fork


def of(folder: Path, *overrides: str, rows: list[dict] | None = None) -> RecordedRun:
    path = write_metrics_file(folder, constant_reward_rows(40) if rows is None else rows)
    return load_file_record(path, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, *overrides))


def events(moves: tuple[Transition, ...]) -> list[tuple[int, str]]:
    return [(move.step, move.event) for move in moves]


FOLLOWED = ("trigger", "accepted", "guided", "rolled_back", "replayed")
"""What follows a warning where there is a checkpoint."""


def test_a_plateau_runs_through_the_whole_machine_until_the_cap(tmp_path):
    found = simulate_autonpo(of(tmp_path))
    assert events(found.transitions) == [
        (0, "started"),
        # warm-up 10; the streak is 11, 12, 13
        (11, "armed"),
        (13, "warning"),
        *((13, event) for event in FOLLOWED),
        # rest of 4: 14 to 17
        (18, "armed"),
        (20, "warning"),
        *((20, event) for event in FOLLOWED),
        (25, "armed"),
        (27, "warning"),
        (27, "capped"),
    ]
    assert [reading.step for reading in found.readings] == list(range(1, 41))


def test_why_nothing_happened_is_told_of_every_other_step(tmp_path):
    found = simulate_autonpo(of(tmp_path))
    assert [(one.reason, one.first_step, one.last_step, one.num_steps) for one in merge_reasons(found.reasons)] == [
        ("warming_up", 1, 10, 10),
        ("streak", 11, 12, 2),
        ("resting", 14, 17, 4),
        ("streak", 18, 19, 2),
        ("resting", 21, 24, 4),
        ("streak", 25, 26, 2),
        ("capped", 27, 40, 14),
    ]


def test_what_nobody_could_be_asked_is_marked_as_assumed(tmp_path):
    found = {(move.step, move.event): move for move in simulate_autonpo(of(tmp_path)).transitions}
    # at 13: 5 and 10 steps back; at 20 also 20
    assert found[13, "accepted"].evidence == {"assumed": True, "distance": 10}
    assert found[13, "guided"].evidence == {"assumed": True}
    assert found[13, "rolled_back"].evidence == {"assumed": True, "to_steps": [3, 8]}
    assert found[20, "rolled_back"].evidence == {"assumed": True, "to_steps": [0, 10, 15]}
    assert found[20, "rolled_back"].state == AutoNPOState(
        branch="-", step=0, phase="REPLAY", num_interventions=2, distance=20, until_step=20
    )
    assert not found[13, "trigger"].evidence.get("assumed")
    assert found[0, "started"].evidence["settings"]["autonpo"]["trigger"]["window"] == 5


def test_with_checkpoints_apart_a_trigger_waits_for_one_and_goes_back_to_one(tmp_path):
    found = simulate_autonpo(of(tmp_path, "train.save_every=10", "autonpo.max_interventions=1"))
    # warned at 13, checkpoint at 20; of 5, 10 and 20 the last two lead to one
    assert events(found.transitions)[1:4] == [(11, "armed"), (13, "warning"), (20, "trigger")]
    back = next(move for move in found.transitions if move.event == "rolled_back")
    assert back.evidence["to_steps"] == [0, 10]
    assert NonTriggerSpan(reason="waiting", first_step=13, last_step=19, num_steps=7) in list(
        merge_reasons(found.reasons)
    )


def test_where_no_distance_leads_to_a_checkpoint_the_chance_is_missed(tmp_path):
    found = simulate_autonpo(of(tmp_path, "train.save_every=7", "autonpo.max_interventions=1"))
    # 14 is the first checkpoint; none of 5, 10, 20 is a multiple of 7
    assert events(found.transitions)[2:5] == [(13, "warning"), (14, "trigger"), (14, "missed")]
    assert found.transitions[4].evidence == {
        "what": "no distance of autonpo.rollback.distances leads from step 14 to a checkpoint"
    }
    assert found.transitions[4].state.num_interventions == 0


def test_a_held_out_test_is_assumed_to_keep_the_replay(tmp_path):
    found = simulate_autonpo(of(tmp_path, "autonpo.replay.acceptance_test=true", "autonpo.max_interventions=1"))
    kept = [move for move in found.transitions if move.event in ("replayed", "kept")]
    assert [(move.step, move.event, move.state.phase) for move in kept] == [
        (13, "replayed", "JUDGE"),
        (13, "kept", "COOLDOWN"),
    ]
    assert kept[1].evidence == {"assumed": True}


def test_an_early_bootstrap_is_rehearsed_too(tmp_path):
    found = simulate_autonpo(of(tmp_path, "autonpo.early.enabled=true", "autonpo.early.scout_steps=5"))
    assert events(found.transitions)[:5] == [(0, "started"), *((5, event) for event in ("early", *FOLLOWED[2:]))]
    assert found.transitions[3].evidence == {"assumed": True, "to_steps": [0]}


def test_an_early_bootstrap_goes_back_to_where_it_began_and_nowhere_else(tmp_path):
    found = simulate_autonpo(
        of(
            tmp_path,
            "autonpo.early.enabled=true",
            "autonpo.early.scout_steps=8",
            "autonpo.max_interventions=0",
            rows=constant_reward_rows(12),
        )
    )
    (back,) = [move for move in found.transitions if move.event == "rolled_back"]
    assert (back.step, back.evidence) == (8, {"assumed": True, "to_steps": [0]})


def test_a_rise_and_a_level_entropy_never_fire(tmp_path):
    rising = [row | {"reward": row["step"] / 100} for row in constant_reward_rows(40)]
    level = [row | {"entropy": 1.0} for row in constant_reward_rows(40)]
    for rows, reason in ((rising, "rising"), (level, "entropy_level")):
        found = simulate_autonpo(of(tmp_path, rows=rows))
        assert events(found.transitions) == [(0, "started"), (11, "armed")]
        assert {why for step, why in found.reasons if step > 10} == {reason}


def test_the_rehearsal_is_the_controller_itself(tmp_path):
    """Without a checkpoint nothing is assumed: then the moves are those of `advance` over the same readings."""
    rows = [row | {"reward": 0.5 + 0.1 * (row["step"] in (15, 22))} for row in constant_reward_rows(40)]
    record = of(tmp_path, "train.save_every=1000", rows=rows)
    watch, knobs = Trigger(trigger_knobs(record.recipe)), controller_knobs(record.recipe)
    state, moves = AutoNPOState(branch="-", step=0), []
    for signal in record.trigger_inputs:
        state, some = advance(state, StepObserved(reading=watch.observe(signal), has_checkpoint=False), knobs=knobs)
        moves += some
    assert simulate_autonpo(record).transitions[1:] == tuple(moves)
    assert "recovered" in {move.event for move in moves}


def test_records_far_apart_and_from_a_later_step_on_are_rehearsed(tmp_path):
    rows = [row for row in constant_reward_rows(400) if row["step"] % 10 == 0 and row["step"] >= 100]
    record = of(tmp_path, rows=rows)
    # compared with the record 10 steps before: from the second record on; the streak is 110, 120, 130... but the
    # first two have too few values to tell noise by (3), so it is 120, 130, 140
    assert events(simulate_autonpo(record).transitions)[:4] == [
        (0, "started"),
        (100, "armed"),
        (140, "warning"),
        (140, "trigger"),
    ]
    assert (
        "records are 10 steps apart: autonpo.trigger.patience counts records, everything else steps"
        in record.assumptions
    )


def test_a_record_of_step_0_is_seen(tmp_path):
    rows = [{"step": 0, "reward": 0.5, "entropy": 1.0}, *constant_reward_rows(3)]
    found = simulate_autonpo(of(tmp_path, rows=rows))
    assert events(found.transitions) == [(0, "started")]
    assert [step for step, _ in found.reasons] == [0, 1, 2, 3]


# Runs


def test_a_run_is_rehearsed_like_a_file_of_its_metrics(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    mine = load_run_record(
        run.root, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, "train.save_every=1"), branch=None
    )
    theirs = of(tmp_path)
    assert mine.trigger_inputs == theirs.trigger_inputs
    assert events(simulate_autonpo(mine).transitions) == events(simulate_autonpo(theirs).transitions)


def test_a_run_has_checkpoints_where_its_recipe_says(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    record = load_run_record(run.root, columns=LogColumns(), overrides=SENSITIVE_TRIGGER, branch=None)
    # train.save_every is 20 by default
    assert [move.step for move in simulate_autonpo(record).transitions if move.event == "trigger"] == [20, 40]


def test_a_branch_is_rehearsed_along_its_line_of_descent(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(30))
    fork(run, "again", parent="main", at=12)
    append_metrics(run, "again", [row | {"reward": 0.9} for row in constant_reward_rows(20)[12:]])
    for branch, wanted in ((None, {0.9}), ("again", {0.9}), ("main", {0.5})):
        record = load_run_record(run.root, columns=LogColumns(), overrides=(), branch=branch)
        assert [signal.step for signal in record.trigger_inputs] == list(range(1, 21 if wanted == {0.9} else 31))
        assert {signal.reward for signal in record.trigger_inputs if signal.step > 12} == wanted
        assert {signal.reward for signal in record.trigger_inputs if signal.step <= 12} == {0.5}


def test_settings_that_no_run_could_have_are_no_error_in_a_rehearsal(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    # frozen in a run, no multiple of save_every, warm-up beyond its end
    odd = ("train.prompts_per_step=2", "autonpo.rollback.distances=[3]", "autonpo.trigger.warmup_steps=100")
    record = load_run_record(run.root, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, *odd), branch=None)
    assert events(simulate_autonpo(record).transitions) == [(0, "started")]


def test_a_run_without_steps_is_refused(tmp_path):
    run = make_run(tmp_path, [])
    with pytest.raises(NpoError, match="has no steps on branch main yet"):
        load_run_record(run.root, columns=LogColumns(), overrides=(), branch=None)


def test_missing_values_delay_the_warning_by_as_many_steps(tmp_path):
    rows = [row | {"reward": None} if row["step"] == 12 else row for row in constant_reward_rows(40)]
    found = simulate_autonpo(of(tmp_path, rows=rows))
    assert events(found.transitions)[2] == (14, "warning")
    assert (12, "no_signal") in found.reasons
