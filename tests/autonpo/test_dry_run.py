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


def told(source: Path, *overrides: str, draw: bool = False, **options: Any) -> list[Any]:
    asked = {"branch": None, "picture": None} | options
    return list(
        explain_autonpo(source, columns=LogColumns(), overrides=(*SENSITIVE_TRIGGER, *overrides), draw=draw, **asked)
    )


def words(records: list[Any]) -> list[str]:
    return [record.message for record in records if isinstance(record, Notice)]


def with_checkpoints(run: RunDir, *steps: int) -> RunDir:
    for step in steps:
        write_checkpoint(run, step)
    return run


def test_moves_come_first_then_the_reasons_then_the_conclusion(tmp_path):
    records = told(write_metrics_file(tmp_path, constant_reward_rows(40)))
    kinds = list(dict.fromkeys(type(record) for record in records))
    assert kinds == [Notice, Transition, NonTriggerSpan]
    assert words(records) == [
        "read as step: step, reward: reward, entropy: entropy",
        "every record counts as a checkpoint; train.save_every=N says otherwise",
        "it would have fired 2 times in 40 recorded steps: at 13 and 20",
        "autonpo.max_interventions = 2 would have kept it from firing again from step 27 on",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_a_record_on_which_it_would_never_fire_says_what_kept_it(tmp_path):
    path = write_metrics_file(tmp_path, [row | {"entropy": 1.0} for row in constant_reward_rows(40)])
    # 30 of the 40 steps come after the warm-up
    last = "it would never have fired in 40 recorded steps, most of them: entropy_level"
    assert words(told(path, "train.save_every=1"))[-1] == last


def test_the_picture_lies_beside_the_records_unless_told_otherwise(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    path = write_metrics_file(tmp_path, constant_reward_rows(40))
    told(run.root, draw=True)
    told(path, draw=True)
    records = told(path, draw=True, picture=tmp_path / "new" / "other.svg")
    pictures = (run.root / "autonpo.png", tmp_path / "metrics.jsonl.autonpo.png", tmp_path / "new" / "other.svg")
    assert all(picture.stat().st_size > 1000 for picture in pictures)
    assert f"the picture is in {tmp_path / 'new' / 'other.svg'}" in words(records)


def test_where_nothing_may_be_written_there_is_no_picture_but_all_the_rest(tmp_path, monkeypatch):
    run = make_run(tmp_path, constant_reward_rows(40))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != run.root)
    records = told(run.root, draw=True)
    assert f"no picture: {run.root} may not be written in; --out FILE names another place" in words(records)
    assert any(isinstance(record, Transition) for record in records)
    assert not (run.root / "autonpo.png").exists()


def test_what_the_run_really_did_has_a_band_of_its_own(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(40))
    told(run.root, draw=True, picture=tmp_path / "a.svg")
    append_transitions(run, [moved(20, "trigger", "PROBE")])
    told(run.root, draw=True, picture=tmp_path / "b.svg")
    bands = [("<!-- happened -->" in (tmp_path / name).read_text(encoding="utf-8")) for name in ("a.svg", "b.svg")]
    assert bands == [False, True]


# By hand

QUARTERS = ("train.save_every=4", "autonpo.rollback.distances=[4,8]", "autonpo.max_interventions=1")
"""Fires once, at 16."""


def by_hand(run: RunDir, *overrides: str, **options: Any) -> list[str]:
    return [line for line in words(told(run.root, *overrides, **options)) if line.startswith("by hand")]


def test_a_trigger_in_a_run_comes_with_the_commands_that_do_the_same_by_hand(tmp_path):
    run = with_checkpoints(make_run(tmp_path, constant_reward_rows(40)), 0, 4, 8, 12, 16, 20)
    # fires at 16, the first multiple of 4 after 13: the plateau began at 16 - 5 = 11, so at 8; then 8 + 10 = 18
    root = run.root
    assert by_hand(run, *QUARTERS, "autonpo.replay.suggested_steps=10") == [
        f"by hand, for step 16: npo sample-guide {root} --at 8 --guide 16 && "
        f"npo resume {root} --at 8 --guide main-8-by-16"
    ]


def test_by_hand_only_between_checkpoints_that_are_there_and_steps_that_were_made(tmp_path):
    run = with_checkpoints(make_run(tmp_path, constant_reward_rows(40)), 8, 16)
    assert len(by_hand(run, *QUARTERS, "autonpo.replay.suggested_steps=32")) == 1
    # 8 + 33 = 41 is beyond the record
    assert by_hand(run, *QUARTERS, "autonpo.replay.suggested_steps=33") == []
    # 8 + 7 = 15: no checkpoint after 8
    assert by_hand(run, *QUARTERS, "autonpo.replay.suggested_steps=7") == []
    # nothing at or before 16 - 9 = 7
    assert by_hand(run, *QUARTERS, "autonpo.replay.suggested_steps=10", "autonpo.trigger.window=9") == []
    path = write_metrics_file(tmp_path, constant_reward_rows(40))
    assert not any(
        line.startswith("by hand") for line in words(told(path, *QUARTERS, "autonpo.replay.suggested_steps=10"))
    )


def test_by_hand_names_a_branch_that_is_not_the_newest(tmp_path):
    run = with_checkpoints(make_run(tmp_path, constant_reward_rows(40)), 8, 16)
    fork(run, "again", parent="main", at=16)
    append_metrics(run, "again", constant_reward_rows(20)[16:])
    (line,) = by_hand(run, *QUARTERS, "autonpo.replay.suggested_steps=10", branch="main")
    assert "--at 8 --guide 16 --branch main && " in line


# What really happened


def moved(step: int, event: str, phase: str, **evidence: Any) -> Transition:
    state = AutoNPOState(branch="main", step=step, phase=phase)
    return Transition(step=step, event=event, phase_before="TRAIN", state=state, evidence=evidence)


def test_what_happened_is_every_move_and_the_account(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(4))
    moves = [moved(0, "started", "TRAIN"), moved(3, "warning", "TRAIN", gain=0.1)]
    append_transitions(run, moves)
    *found, cost = report_history(run.root, branch=None)
    assert found == moves
    assert isinstance(cost, RunCosts)
    # 4 steps of 10 tokens
    assert (cost.branch, cost.updates, cost.tokens) == ("main", 4, 40)


def test_the_account_is_that_of_the_branch_asked_for(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(4))
    append_transitions(run, [moved(0, "started", "TRAIN")])
    fork(run, "again", parent="main", at=2)
    append_metrics(run, "again", constant_reward_rows(3)[2:])
    found = {branch: list(report_history(run.root, branch=branch))[-1] for branch in (None, "main")}
    assert (found[None].branch, found[None].training_tokens, found[None].abandoned_tokens) == ("again", 30, 20)
    assert (found["main"].branch, found["main"].training_tokens, found["main"].abandoned_tokens) == ("main", 40, 10)


def test_a_run_that_autonpo_never_watched_says_so(tmp_path):
    run = make_run(tmp_path, constant_reward_rows(4))
    with pytest.raises(NpoError, match="AutoNPO never watched") as caught:
        list(report_history(run.root, branch=None))
    assert caught.value.hint == f"npo resume {run.root} --autonpo"
