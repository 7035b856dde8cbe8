"""`npo autonpo`: the simulation on records whose transitions follow by hand, its plot and summary, and the history."""

from pathlib import Path
from typing import Any

import pytest

from npo_cli.autonpo.controller import StepObserved, advance
from npo_cli.autonpo.dry_run import (
    RecordedRun,
    explain_autonpo,
    load_file_record,
    load_run_record,
    merge_reasons,
    report_history,
    simulate_autonpo,
)
from npo_cli.autonpo.trainer_logs import LogColumns
from npo_cli.autonpo.trigger import Trigger
from npo_cli.errors import NpoError
from npo_cli.storage.autonpo_log import append_transitions
from npo_cli.storage.layout import RunDir
from npo_cli.types.autonpo import AutoNPOState, NonTriggerSpan, Transition
from npo_cli.types.costs import RunCosts
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import Conclusion
from tests.autonpo.simulated_signals import event_steps
from tests.helpers.recorded_metrics import (
    SENSITIVE_TRIGGER,
    append_metrics,
    constant_reward_rows,
    make_run,
    write_metrics_file,
)
from tests.storage.builders import fork, write_checkpoint

# Simulation


def load_record(folder: Path, *overrides: str, rows: list[dict] | None = None) -> RecordedRun:
    path = write_metrics_file(folder, constant_reward_rows(40) if rows is None else rows)
    return load_file_record(path, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, *overrides))


INTERVENTION = ("trigger", "probe_accepted", "guide_built", "rolled_back", "replay_done")
"""The transitions that follow a warning at a checkpoint."""


def test_dry_run_of_a_plateau_intervenes_until_the_limit(tmp_path):
    found = simulate_autonpo(load_record(tmp_path))
    assert event_steps(found.transitions) == [
        (0, "started"),
        # warm-up 10; the streak is 11, 12, 13
        (11, "armed"),
        (13, "warning"),
        *((13, event) for event in INTERVENTION),
        # cooldown of 4: 14 to 17
        (18, "armed"),
        (20, "warning"),
        *((20, event) for event in INTERVENTION),
        (25, "armed"),
        (27, "warning"),
        (27, "limit_reached"),
    ]
    assert [reading.step for reading in found.readings] == list(range(1, 41))


def test_dry_run_has_a_reason_for_every_step_without_a_trigger(tmp_path):
    found = simulate_autonpo(load_record(tmp_path))
    assert [(one.reason, one.first_step, one.last_step, one.num_steps) for one in merge_reasons(found.reasons)] == [
        ("warmup", 1, 10, 10),
        ("short_streak", 11, 12, 2),
        ("cooldown", 14, 17, 4),
        ("short_streak", 18, 19, 2),
        ("cooldown", 21, 24, 4),
        ("short_streak", 25, 26, 2),
        ("limit_reached", 27, 40, 14),
    ]


def test_dry_run_marks_assumed_evidence(tmp_path):
    found = {
        (transition.step, transition.event): transition
        for transition in simulate_autonpo(load_record(tmp_path)).transitions
    }
    # at 13: 5 and 10 steps back; at 20 also 20
    assert found[13, "probe_accepted"].evidence == {"assumed": True, "distance": 10}
    assert found[13, "guide_built"].evidence == {"assumed": True}
    assert found[13, "rolled_back"].evidence == {"assumed": True, "to_steps": [3, 8]}
    assert found[20, "rolled_back"].evidence == {"assumed": True, "to_steps": [0, 10, 15]}
    assert found[20, "rolled_back"].state == AutoNPOState(
        branch="-", step=0, phase="REPLAY", num_interventions=2, distance=20, until_step=20
    )
    assert not found[13, "trigger"].evidence.get("assumed")
    assert found[0, "started"].evidence["settings"]["autonpo"]["trigger"]["window"] == 5


def test_dry_run_trigger_waits_for_a_checkpoint(tmp_path):
    found = simulate_autonpo(load_record(tmp_path, "train.save_every=10", "autonpo.max_interventions=1"))
    # warned at 13, checkpoint at 20; of 5, 10 and 20 the last two lead to one
    assert event_steps(found.transitions)[1:4] == [(11, "armed"), (13, "warning"), (20, "trigger")]
    back = next(transition for transition in found.transitions if transition.event == "rolled_back")
    assert back.evidence["to_steps"] == [0, 10]
    assert NonTriggerSpan(reason="no_checkpoint", first_step=13, last_step=19, num_steps=7) in list(
        merge_reasons(found.reasons)
    )


def test_dry_run_without_a_reachable_checkpoint_ends_the_intervention(tmp_path):
    found = simulate_autonpo(load_record(tmp_path, "train.save_every=7", "autonpo.max_interventions=1"))
    # 14 is the first checkpoint; none of 5, 10, 20 is a multiple of 7
    assert event_steps(found.transitions)[2:5] == [(13, "warning"), (14, "trigger"), (14, "prerequisite_missing")]
    assert found.transitions[4].evidence == {
        "reason": "no distance of autonpo.rollback.distances leads from step 14 to a checkpoint"
    }
    assert found.transitions[4].state.num_interventions == 0


def test_dry_run_assumes_that_the_acceptance_test_accepts(tmp_path):
    found = simulate_autonpo(
        load_record(tmp_path, "autonpo.replay.acceptance_test=true", "autonpo.max_interventions=1")
    )
    kept = [transition for transition in found.transitions if transition.event in ("replay_done", "replay_accepted")]
    assert [(transition.step, transition.event, transition.state.phase) for transition in kept] == [
        (13, "replay_done", "ACCEPTANCE_TEST"),
        (13, "replay_accepted", "COOLDOWN"),
    ]
    assert kept[1].evidence == {"assumed": True}


def test_dry_run_simulates_the_early_bootstrap(tmp_path):
    found = simulate_autonpo(load_record(tmp_path, "autonpo.early.enabled=true", "autonpo.early.scout_steps=5"))
    assert event_steps(found.transitions)[:5] == [
        (0, "started"),
        *((5, event) for event in ("early_bootstrap", *INTERVENTION[1:4])),
    ]
    assert found.transitions[4].evidence == {"assumed": True, "to_steps": [0]}


def test_dry_run_early_bootstrap_rolls_back_to_its_start(tmp_path):
    found = simulate_autonpo(
        load_record(
            tmp_path,
            "autonpo.early.enabled=true",
            "autonpo.early.scout_steps=8",
            "autonpo.max_interventions=0",
            rows=constant_reward_rows(12),
        )
    )
    (back,) = [transition for transition in found.transitions if transition.event == "rolled_back"]
    assert (back.step, back.evidence) == (8, {"assumed": True, "to_steps": [0]})


def test_dry_run_never_triggers_on_a_rise_or_level_entropy(tmp_path):
    rising = [row | {"reward": row["step"] / 100} for row in constant_reward_rows(40)]
    level = [row | {"entropy": 1.0} for row in constant_reward_rows(40)]
    for rows, reason in ((rising, "rising"), (level, "entropy_level")):
        found = simulate_autonpo(load_record(tmp_path, rows=rows))
        assert event_steps(found.transitions) == [(0, "started"), (11, "armed")]
        assert {why for step, why in found.reasons if step > 10} == {reason}


def test_dry_run_equals_the_controller(tmp_path):
    """Without a checkpoint nothing is assumed: then the transitions are those of `advance` over the same readings."""
    rows = [row | {"reward": 0.5 + 0.1 * (row["step"] in (15, 22))} for row in constant_reward_rows(40)]
    record = load_record(tmp_path, "train.save_every=1000", rows=rows)
    settings = record.recipe.autonpo
    trigger = Trigger(settings.trigger)
    state, transitions = AutoNPOState(branch="-", step=0), []
    for signal in record.trigger_inputs:
        event = StepObserved(reading=trigger.observe(signal), has_checkpoint=False)
        state, some = advance(state, event, settings)
        transitions += some
    assert simulate_autonpo(record).transitions[1:] == tuple(transitions)
    assert "recovered" in {transition.event for transition in transitions}


def test_dry_run_of_sparse_records_from_a_later_step(tmp_path):
    rows = [row for row in constant_reward_rows(400) if row["step"] % 10 == 0 and row["step"] >= 100]
    record = load_record(tmp_path, rows=rows)
    # compared with the record 10 steps before: from the second record on; the streak is 110, 120, 130... but the
    # first two have too few values to tell noise by (3), so it is 120, 130, 140
    assert event_steps(simulate_autonpo(record).transitions)[:4] == [
        (0, "started"),
        (100, "armed"),
        (140, "warning"),
        (140, "trigger"),
    ]
    assert (
        "records are 10 steps apart: autonpo.trigger.patience counts records, every other setting counts steps"
        in record.assumptions
    )


def test_dry_run_reads_step_0(tmp_path):
    rows = [{"step": 0, "reward": 0.5, "entropy": 1.0}, *constant_reward_rows(3)]
    found = simulate_autonpo(load_record(tmp_path, rows=rows))
    assert event_steps(found.transitions) == [(0, "started")]
    assert [step for step, _ in found.reasons] == [0, 1, 2, 3]


# Runs


def test_dry_run_of_a_run_equals_that_of_its_metrics_file(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    mine = load_run_record(
        run.root, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, "train.save_every=1"), branch=None
    )
    theirs = load_record(tmp_path)
    assert mine.trigger_inputs == theirs.trigger_inputs
    assert event_steps(simulate_autonpo(mine).transitions) == event_steps(simulate_autonpo(theirs).transitions)


def test_dry_run_uses_the_checkpoints_of_the_recipe(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    record = load_run_record(run.root, columns=LogColumns(), overrides=SENSITIVE_TRIGGER, branch=None)
    # train.save_every is 20 by default
    assert [
        transition.step for transition in simulate_autonpo(record).transitions if transition.event == "trigger"
    ] == [20, 40]


def test_dry_run_of_a_branch_reads_its_ancestry(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(30))
    fork(run, "again", parent="main", at=12)
    append_metrics(run, "again", [row | {"reward": 0.9} for row in constant_reward_rows(20)[12:]])
    for branch, wanted in ((None, {0.5}), ("again", {0.9}), ("main", {0.5})):
        record = load_run_record(run.root, columns=LogColumns(), overrides=(), branch=branch)
        assert [signal.step for signal in record.trigger_inputs] == list(range(1, 21 if wanted == {0.9} else 31))
        assert {signal.reward for signal in record.trigger_inputs if signal.step > 12} == wanted
        assert {signal.reward for signal in record.trigger_inputs if signal.step <= 12} == {0.5}


def test_dry_run_accepts_settings_that_no_run_could_have(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    # frozen in a run, no multiple of save_every, warm-up beyond its end
    odd = ("train.prompts_per_step=2", "autonpo.rollback.distances=[3]", "autonpo.trigger.warmup_steps=100")
    record = load_run_record(run.root, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, *odd), branch=None)
    assert event_steps(simulate_autonpo(record).transitions) == [(0, "started")]


def test_dry_run_refuses_a_run_without_steps(tmp_path):
    run = make_run(tmp_path, [])
    with pytest.raises(NpoError, match="has no steps on branch main yet"):
        load_run_record(run.root, columns=LogColumns(), overrides=(), branch=None)


def test_dry_run_warning_is_delayed_by_missing_values(tmp_path):
    rows = [row | {"reward": None} if row["step"] == 12 else row for row in constant_reward_rows(40)]
    found = simulate_autonpo(load_record(tmp_path, rows=rows))
    assert event_steps(found.transitions)[2] == (14, "warning")
    assert (12, "no_signal") in found.reasons


# Records, plot and summary


def explain(source: Path, *overrides: str, draw: bool = False, **options: Any) -> list[Any]:
    options = {"branch": None, "figure_path": None} | options
    return list(
        explain_autonpo(source, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, *overrides), draw=draw, **options)
    )


def messages(records: list[Any]) -> list[str]:
    return [record.message for record in records if isinstance(record, Notice)]


def with_checkpoints(run: RunDir, *steps: int) -> RunDir:
    for step in steps:
        write_checkpoint(run, step)
    return run


def test_dry_run_yields_transitions_reasons_and_a_summary(tmp_path):
    records = explain(write_metrics_file(tmp_path, constant_reward_rows(40)))
    kinds = list(dict.fromkeys(type(record) for record in records))
    assert kinds == [Notice, Transition, NonTriggerSpan, Conclusion]
    assert records[-1] == Conclusion(
        sentence="AutoNPO would have triggered 2 times in 40 recorded steps: at 13 and 20",
        next="npo index RUN --import FOLDER --recipe RECIPE",
    )
    assert messages(records) == [
        "read as step: step, reward: reward, entropy: entropy",
        "every record is assumed to have a checkpoint (change it with train.save_every=N)",
        "autonpo.max_interventions=2 would have prevented further triggers from step 27 on",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_dry_run_without_a_trigger_gives_the_most_frequent_reason(tmp_path):
    path = write_metrics_file(tmp_path, [row | {"entropy": 1.0} for row in constant_reward_rows(40)])
    # 30 of the 40 steps come after the warm-up
    last = "AutoNPO would never have triggered in 40 recorded steps; most frequent reason: entropy_level"
    assert explain(path, "train.save_every=1")[-1].sentence == last


def test_dry_run_plot_is_saved_beside_the_source_by_default(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    path = write_metrics_file(tmp_path, constant_reward_rows(40))
    explain(run.root, draw=True)
    explain(path, draw=True)
    records = explain(path, draw=True, figure_path=tmp_path / "new" / "other.svg")
    plots = (run.root / "autonpo.png", tmp_path / "metrics.jsonl.autonpo.png", tmp_path / "new" / "other.svg")
    assert all(plot.stat().st_size > 1000 for plot in plots)
    assert f"plot saved to {tmp_path / 'new' / 'other.svg'}" in messages(records)


def test_dry_run_without_write_permission_has_no_plot(tmp_path, monkeypatch):
    run = make_run(tmp_path, constant_reward_rows(40))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != run.root)
    records = explain(run.root, draw=True)
    assert f"no plot: {run.root} is not writable (choose a file with --figure FILE)" in messages(records)
    assert any(isinstance(record, Transition) for record in records)
    assert not (run.root / "autonpo.png").exists()


def test_dry_run_plot_has_a_band_for_recorded_transitions(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    explain(run.root, draw=True, figure_path=tmp_path / "a.svg")
    append_transitions(run, [make_transition(20, "trigger", "PROBE")])
    explain(run.root, draw=True, figure_path=tmp_path / "b.svg")
    bands = [("<!-- recorded -->" in (tmp_path / name).read_text(encoding="utf-8")) for name in ("a.svg", "b.svg")]
    assert bands == [False, True]


# By hand

EVERY_4 = ("train.save_every=4", "autonpo.rollback.distances=[4,8]", "autonpo.max_interventions=1")
"""Triggers once, at 16."""


def by_hand(run: RunDir, *overrides: str, **options: Any) -> list[str]:
    return [line for line in messages(explain(run.root, *overrides, **options)) if line.startswith("by hand")]


def test_dry_run_suggests_commands_for_a_manual_replay(tmp_path):
    run = with_checkpoints(make_run(tmp_path, constant_reward_rows(40)), 0, 4, 8, 12, 16, 20)
    # triggers at 16, the first multiple of 4 after 13: the plateau began at 16 - 5 = 11, so at 8; then 8 + 10 = 18
    root = run.root
    assert by_hand(run, *EVERY_4, "autonpo.replay.suggested_steps=10") == [
        f"by hand, for step 16: npo sample-guide {root} --at 8 --source 16 --name main-8-by-16 && "
        f"npo resume {root} --at 8 --guide main-8-by-16"
    ]


def test_dry_run_suggests_only_existing_checkpoints_and_steps(tmp_path):
    run = with_checkpoints(make_run(tmp_path, constant_reward_rows(40)), 8, 16)
    assert len(by_hand(run, *EVERY_4, "autonpo.replay.suggested_steps=32")) == 1
    # 8 + 33 = 41 is beyond the record
    assert by_hand(run, *EVERY_4, "autonpo.replay.suggested_steps=33") == []
    # 8 + 7 = 15: no checkpoint after 8
    assert by_hand(run, *EVERY_4, "autonpo.replay.suggested_steps=7") == []
    # nothing at or before 16 - 9 = 7
    assert by_hand(run, *EVERY_4, "autonpo.replay.suggested_steps=10", "autonpo.trigger.window=9") == []
    path = write_metrics_file(tmp_path, constant_reward_rows(40))
    assert not any(
        line.startswith("by hand") for line in messages(explain(path, *EVERY_4, "autonpo.replay.suggested_steps=10"))
    )


def test_dry_run_suggestion_names_a_branch_that_is_not_main(tmp_path):
    run = with_checkpoints(make_run(tmp_path, constant_reward_rows(40)), 8, 16)
    fork(run, "again", parent="main", at=16)
    append_metrics(run, "again", constant_reward_rows(40)[16:])
    (line,) = by_hand(run, *EVERY_4, "autonpo.replay.suggested_steps=10", branch="again")
    assert "--at 8 --source 16 --name again-8-by-16 --branch again && " in line


# What happened


def make_transition(step: int, event: str, phase: str, **evidence: Any) -> Transition:
    state = AutoNPOState(branch="main", step=step, phase=phase)
    return Transition(step=step, event=event, phase_before="TRAIN", state=state, evidence=evidence)


def test_autonpo_history_is_every_transition_and_the_costs(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(4))
    transitions = [make_transition(0, "started", "TRAIN"), make_transition(3, "warning", "TRAIN", reward_gain=0.1)]
    append_transitions(run, transitions)
    *found, cost = report_history(run.root, branch=None)
    assert found == transitions
    assert isinstance(cost, RunCosts)
    # 4 steps of 10 tokens
    assert (cost.branch, cost.updates, cost.tokens) == ("main", 4, 40)


def test_autonpo_history_costs_are_those_of_the_given_branch(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(4))
    append_transitions(run, [make_transition(0, "started", "TRAIN")])
    fork(run, "again", parent="main", at=2)
    append_metrics(run, "again", constant_reward_rows(3)[2:])
    found = {branch: list(report_history(run.root, branch=branch))[-1] for branch in (None, "again")}
    # AutoNPO is on main
    assert (found[None].branch, found[None].training_tokens, found[None].abandoned_tokens) == ("main", 40, 10)
    assert (found["again"].branch, found["again"].training_tokens, found["again"].abandoned_tokens) == ("again", 30, 20)


def test_autonpo_history_of_a_run_without_autonpo_is_an_error(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(4))
    with pytest.raises(NpoError, match="was never trained with AutoNPO") as caught:
        list(report_history(run.root, branch=None))
    assert caught.value.hint == f"npo resume {run.root} --autonpo"
