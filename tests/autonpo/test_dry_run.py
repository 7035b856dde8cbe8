"""The story of `npo autonpo`: what it yields and leaves, on runs and files written by hand (see recordings.py)."""

from pathlib import Path
from typing import Any

import pytest

from npo_cli.autonpo.dry_run import explain_autonpo, report_history
from npo_cli.autonpo.trainer_logs import LogColumns
from npo_cli.errors import NpoError
from npo_cli.storage.autonpo_log import append_transitions
from npo_cli.storage.layout import RunDir
from npo_cli.types.autonpo import AutoNPOState, NonTriggerSpan, Transition
from npo_cli.types.costs import RunCosts
from npo_cli.types.rollouts import Notice
from tests.helpers.recorded_metrics import (
    SENSITIVE_TRIGGER,
    append_metrics,
    constant_reward_rows,
    make_run,
    write_metrics_file,
)
from tests.storage.builders import fork, write_checkpoint


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
    assert kinds == [Notice, Transition, NonTriggerSpan]
    assert messages(records) == [
        "read as step: step, reward: reward, entropy: entropy",
        "every record is assumed to have a checkpoint (change it with train.save_every=N)",
        "AutoNPO would have triggered 2 times in 40 recorded steps: at 13 and 20",
        "autonpo.max_interventions=2 would have prevented further triggers from step 27 on",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_dry_run_without_a_trigger_gives_the_most_frequent_reason(tmp_path):
    path = write_metrics_file(tmp_path, [row | {"entropy": 1.0} for row in constant_reward_rows(40)])
    # 30 of the 40 steps come after the warm-up
    last = "AutoNPO would never have triggered in 40 recorded steps; most frequent reason: entropy_level"
    assert messages(explain(path, "train.save_every=1"))[-1] == last


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


def test_dry_run_suggestion_names_a_branch_that_is_not_the_newest(tmp_path):
    run = with_checkpoints(make_run(tmp_path, constant_reward_rows(40)), 8, 16)
    fork(run, "again", parent="main", at=16)
    append_metrics(run, "again", constant_reward_rows(20)[16:])
    (line,) = by_hand(run, *EVERY_4, "autonpo.replay.suggested_steps=10", branch="main")
    assert "--at 8 --source 16 --name main-8-by-16 --branch main && " in line


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
    found = {branch: list(report_history(run.root, branch=branch))[-1] for branch in (None, "main")}
    assert (found[None].branch, found[None].training_tokens, found[None].abandoned_tokens) == ("again", 30, 20)
    assert (found["main"].branch, found["main"].training_tokens, found["main"].abandoned_tokens) == ("main", 40, 10)


def test_autonpo_history_of_a_run_without_autonpo_is_an_error(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(4))
    with pytest.raises(NpoError, match="was never trained with AutoNPO") as caught:
        list(report_history(run.root, branch=None))
    assert caught.value.hint == f"npo resume {run.root} --autonpo"
