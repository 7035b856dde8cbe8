"""autonpo.jsonl: round trip, torn tails, damaged lines, and checkpoints kept for rollbacks."""

import math

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.autonpo_log import append_transitions, autonpo_path, read_transitions
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.retention import apply_retention, find_protected_checkpoints, find_rollback_checkpoints
from npo_cli.types.autonpo import AutoNPOState, Transition
from tests.storage.builders import fork, new_run, write_checkpoint

STATE = AutoNPOState(branch="main", step=8, stagnation_streak=2, has_warned=True, num_interventions=1)
WARNING = Transition(
    step=8, event="warning", phase_before="TRAIN", state=STATE, evidence={"reward_gain": 0.25, "verdict": "stagnant"}
)
TRIGGER = Transition(
    step=8,
    event="trigger",
    phase_before="TRAIN",
    state=AutoNPOState(branch="main", step=8, phase="PROBE", num_interventions=1),
    evidence={"scores": [{"distance": 2, "is_selected": True}], "margin": None},
)


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path)


def test_autonpo_log_round_trip(run):
    assert read_transitions(run) == []
    append_transitions(run, [])
    assert not autonpo_path(run).exists()
    append_transitions(run, [WARNING, TRIGGER])
    append_transitions(run, [WARNING])
    assert read_transitions(run) == [WARNING, TRIGGER, WARNING]


def test_autonpo_log_line_begins_with_step_event_phases_and_branch(run):
    append_transitions(run, [TRIGGER])
    assert (
        autonpo_path(run)
        .read_text()
        .startswith('{"step":8,"event":"trigger","phase_before":"TRAIN","phase":"PROBE","branch":"main","state":{')
    )


def test_autonpo_log_leaves_out_non_finite_numbers(run):
    evidence = {"gain": math.nan, "scores": [{"variance": math.inf, "distance": 2}], "margin": 0.5}
    append_transitions(run, [Transition(step=8, event="armed", phase_before="TRAIN", state=STATE, evidence=evidence)])
    append_transitions(run, [WARNING])
    first, second = read_transitions(run)
    assert first.evidence == {"scores": [{"distance": 2}], "margin": 0.5}
    assert second == WARNING


def test_autonpo_log_torn_tail_is_ignored_and_cut_off(run):
    append_transitions(run, [WARNING, TRIGGER])
    path = autonpo_path(run)
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[1]) - 1):
        path.write_bytes(whole[:-cut])
        rewrite_head(path)
        assert read_transitions(run) == [WARNING]
    append_transitions(run, [TRIGGER])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("old", "new", "detail"),
    [
        ('"state":{', '"status":{', "line 1.*it has no state"),
        ('"num_interventions":1', '"num_interventions":"one"', "line 1"),
        ('"event":"warning"', '"event":7', "line 1"),
    ],
)
def test_autonpo_log_damaged_line_is_an_error(run, old, new, detail):
    append_transitions(run, [WARNING, TRIGGER])
    path = autonpo_path(run)
    path.write_text(path.read_text().replace(old, new, 1))
    rewrite_head(path)
    with pytest.raises(NpoError, match=detail):
        read_transitions(run)


def test_autonpo_log_reads_states_with_unknown_and_missing_fields(run):
    """An unknown field is ignored; a missing one has its default."""
    append_transitions(run, [WARNING])
    path = autonpo_path(run)
    path.write_text(
        path.read_text().replace('"has_tried_early":false,', "").replace('"state":{', '"state":{"mood":"calm",')
    )
    rewrite_head(path)
    assert read_transitions(run) == [WARNING]


# Retention


def start_autonpo(run, branch: str, *, every: int, distances: list[int]) -> None:
    """AutoNPO is active on this branch."""
    recipe = run.read_recipe(branch)
    run.save_recipe(
        branch,
        recipe | {"train": {**recipe["train"], "save_every": every}, "autonpo": {"rollback": {"distances": distances}}},
    )
    append_transitions(
        run, [Transition(step=0, event="started", phase_before="TRAIN", state=AutoNPOState(branch=branch, step=0))]
    )


def test_retention_without_autonpo_keeps_no_rollback_checkpoints(run):
    write_checkpoint(run, 0)
    write_checkpoint(run, 2)
    assert find_rollback_checkpoints(run) == set()


def test_retention_keeps_what_the_next_rollback_may_need(run):
    """Distances 4 and 5, a checkpoint every 2 steps: 5 is not a multiple, so 4 is the longest; from 12 it reaches 8."""
    start_autonpo(run, "main", every=2, distances=[4, 5])
    for step in range(0, 14, 2):
        write_checkpoint(run, step)
    assert find_rollback_checkpoints(run) == {("main", 8), ("main", 10), ("main", 12)}
    plan = apply_retention(run, "main", keep_full_checkpoints=1, keep_weights_only=1)
    # One weights-only checkpoint is kept, the newest.
    assert (plan.demote, plan.delete) == ((6,), (2, 4))


def test_retention_keeps_rollback_checkpoints_of_the_parent(run):
    for step in range(0, 8, 2):
        write_checkpoint(run, step)
    fork(run, "auto-1", parent="main", at=4)
    start_autonpo(run, "auto-1", every=2, distances=[4])
    write_checkpoint(run, 6, branch="auto-1")
    # main's own step 6 is not in the ancestry.
    assert find_protected_checkpoints(run) >= {("main", 2), ("main", 4), ("auto-1", 6)}
    assert ("main", 6) not in find_protected_checkpoints(run)
