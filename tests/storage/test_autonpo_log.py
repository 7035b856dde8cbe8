"""autonpo.jsonl and the probes: written once, read back as they were, mended where a writer died."""

import math

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.autonpo_log import (
    append_transitions,
    autonpo_path,
    count_probe_tokens,
    list_probes,
    open_probe,
    read_transitions,
)
from npo_cli.storage.retention import apply_retention, find_protected_checkpoints, find_rollback_checkpoints
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.autonpo import AutoNPOState, Transition
from tests.storage.builders import fork, group, new_run, write_checkpoint

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


def test_what_was_written_is_read_back(run):
    assert read_transitions(run) == []
    append_transitions(run, [])
    assert not autonpo_path(run).exists()
    append_transitions(run, [WARNING, TRIGGER])
    append_transitions(run, [WARNING])
    assert read_transitions(run) == [WARNING, TRIGGER, WARNING]


def test_a_line_says_who_when_and_what_first(run):
    append_transitions(run, [TRIGGER])
    assert (
        autonpo_path(run)
        .read_text()
        .startswith('{"step":8,"event":"trigger","phase_before":"TRAIN","phase":"PROBE","branch":"main","state":{')
    )


def test_a_number_that_is_none_is_left_out_and_the_rest_of_the_line_stays(run):
    evidence = {"gain": math.nan, "scores": [{"variance": math.inf, "distance": 2}], "margin": 0.5}
    append_transitions(run, [Transition(step=8, event="armed", phase_before="TRAIN", state=STATE, evidence=evidence)])
    append_transitions(run, [WARNING])
    first, second = read_transitions(run)
    assert first.evidence == {"scores": [{"distance": 2}], "margin": 0.5}
    assert second == WARNING


def test_a_torn_tail_is_not_read_and_is_cut_off_before_the_next_line(run):
    append_transitions(run, [WARNING, TRIGGER])
    path = autonpo_path(run)
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[1]) - 1):
        path.write_bytes(whole[:-cut])
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
def test_a_damaged_line_is_named(run, old, new, detail):
    append_transitions(run, [WARNING, TRIGGER])
    path = autonpo_path(run)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(NpoError, match=detail):
        read_transitions(run)


def test_a_state_with_fields_of_tomorrow_is_read(run):
    """A field that this version does not know changes nothing; one that an older one did not write has its default."""
    append_transitions(run, [WARNING])
    path = autonpo_path(run)
    path.write_text(
        path.read_text().replace('"has_tried_early":false,', "").replace('"state":{', '"state":{"mood":"calm",')
    )
    assert read_transitions(run) == [WARNING]


# Probes


def test_a_probe_is_found_again_by_its_policy_and_settings(run):
    assert list_probes(run) == []
    first = open_probe(run, "main", 8, settings={"k": 4, "deltas": [2, 4]})
    assert first.folder.name.startswith("main_step_000008_")
    assert open_probe(run, "main", 8, settings={"deltas": [2, 4], "k": 4}) == first
    others = [
        open_probe(run, "main", 8, settings={"k": 5, "deltas": [2, 4]}),
        open_probe(run, "main", 10, settings={"k": 4, "deltas": [2, 4]}),
        open_probe(run, "auto-1", 8, settings={"k": 4, "deltas": [2, 4]}),
    ]
    assert len({each.folder for each in (first, *others)}) == 4
    assert {(each.branch, each.step) for each in list_probes(run)} == {("main", 8), ("main", 10), ("auto-1", 8)}


def test_a_folder_without_its_question_is_no_probe(run):
    kept = open_probe(run, "main", 8, settings={})
    (kept.folder.parent / "main_step_000009_00000000").mkdir()
    assert list_probes(run) == [kept]


def test_tokens_of_a_probe_are_those_of_its_whole_chunks(run):
    probe = open_probe(run, "main", 8, settings={})
    assert count_probe_tokens(probe) == 0
    # 3 groups of 2 responses of 2 tokens
    RolloutLog(probe.folder / "rollouts.jsonl").write_step(0, [group("p0"), group("p1")])
    RolloutLog(probe.folder / "rollouts.jsonl").write_step(1, [group("p2")])
    assert count_probe_tokens(probe) == 12
    with (probe.folder / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"step":2,"num_groups":2,')
    assert count_probe_tokens(probe) == 12


# Retention


def watched(run, branch: str, *, every: int, deltas: list[int]) -> None:
    """AutoNPO is at work on this branch."""
    recipe = run.read_recipe(branch)
    run.save_recipe(
        branch,
        recipe | {"train": {**recipe["train"], "save_every": every}, "autonpo": {"rollback": {"distances": deltas}}},
    )
    append_transitions(
        run, [Transition(step=0, event="started", phase_before="TRAIN", state=AutoNPOState(branch=branch, step=0))]
    )


def test_nothing_is_in_reach_where_nobody_watches(run):
    write_checkpoint(run, 0)
    write_checkpoint(run, 2)
    assert find_rollback_checkpoints(run) == set()


def test_what_the_next_rollback_may_need_stays_and_the_rest_goes(run):
    """deltas 4 and 5 at steps of 2: 5 is no multiple, so 4 is the longest; from 12 it leads to 8."""
    watched(run, "main", every=2, deltas=[4, 5])
    for step in range(0, 14, 2):
        write_checkpoint(run, step)
    assert find_rollback_checkpoints(run) == {("main", 8), ("main", 10), ("main", 12)}
    plan = apply_retention(run, "main", keep_full_checkpoints=1, keep_weights_only=1)
    # One weights-only checkpoint is kept, the newest.
    assert (plan.demote, plan.delete) == ((6,), (2, 4))


def test_steps_of_the_parent_are_in_reach_from_a_young_branch(run):
    for step in range(0, 8, 2):
        write_checkpoint(run, step)
    fork(run, "auto-1", parent="main", at=4)
    watched(run, "auto-1", every=2, deltas=[4])
    write_checkpoint(run, 6, branch="auto-1")
    # main's own step 6 is not on the line.
    assert find_protected_checkpoints(run) >= {("main", 2), ("main", 4), ("auto-1", 6)}
    assert ("main", 6) not in find_protected_checkpoints(run)
