import json

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.layout import create_run
from npo_cli.storage.lineage import (
    Span,
    ancestry,
    append_segment,
    find_free_branch_name,
    find_newest_branch,
    find_owning_branch,
    find_policy_branch,
    list_branches,
    read_segments,
)
from npo_cli.types.rollouts import Segment
from tests.storage.builders import RECIPE, fork, main_segment, new_run


def test_segments_come_back_and_keep_their_overrides_on_disk(tmp_path):
    run = new_run(tmp_path)
    replay = Segment(branch="late", parent="main", fork_step=80, guide_cache="g80", guide_until=120)
    append_segment(run, replay, overrides=["train.num_steps=400"])
    assert read_segments(run) == (main_segment(), replay)
    line = json.loads(run.segments_path.read_text().splitlines()[1])
    assert line["overrides"] == ["train.num_steps=400"]
    assert line["time"].endswith("+00:00")


def test_branches_are_listed_by_birth_and_the_newest_is_the_last_trained(tmp_path):
    run = new_run(tmp_path)
    fork(run, "late", parent="main", at=40)
    append_segment(run, main_segment())  # main is resumed
    assert list_branches(run) == ["main", "late"]
    assert find_newest_branch(run) == "main"


def test_descent_goes_back_to_the_first_branch(tmp_path):
    run = new_run(tmp_path)
    fork(run, "b", parent="main", at=80)
    fork(run, "c", parent="b", at=120)
    fork(run, "d", parent="b", at=40)  # before b began: b gave nothing
    fork(run, "e", parent="main", at=0)
    assert ancestry(run, "main") == [Span("main", 0, None)]
    assert ancestry(run, "c") == [Span("main", 0, 80), Span("b", 80, 120), Span("c", 120, None)]
    assert ancestry(run, "d") == [Span("main", 0, 40), Span("d", 40, None)]
    assert ancestry(run, "e") == [Span("main", 0, 0), Span("e", 0, None)]


def test_weights_of_a_merged_start_are_the_branch_s_own_and_its_training_the_parent_s(tmp_path):
    run = new_run(tmp_path)
    fork(run, "late", parent="main", at=40)
    merged = Segment(
        branch="merged",
        parent="late",
        fork_step=80,
        guide_cache=None,
        guide_until=None,
        merge_weight=0.25,
        merge_plus=("main", 80),
        merge_minus=("main", 40),
    )
    append_segment(run, merged)
    fork(run, "again", parent="merged", at=80)
    fork(run, "before", parent="merged", at=60)
    line = [Span("main", 0, 40), Span("late", 40, 80), Span("merged", 80, None, True)]
    assert ancestry(run, "merged") == line
    assert [find_policy_branch(run, "merged", step) for step in (40, 79, 80, 81)] == [
        "main",
        "late",
        "merged",
        "merged",
    ]
    assert [find_owning_branch(run, "merged", step) for step in (79, 80, 81)] == ["late", "late", "merged"]
    # What was forked from the merged start has it in its line, what was forked before has not.
    assert ancestry(run, "again") == [*line[:2], Span("merged", 80, 80, True), Span("again", 80, None)]
    assert find_policy_branch(run, "again", 80) == "merged"
    assert find_policy_branch(run, "before", 60) == "late"
    assert read_segments(run)[2].merge_spec == "main:80,minus=main:40,weight=0.25"


def test_a_step_belongs_to_the_branch_that_made_it(tmp_path):
    run = new_run(tmp_path)
    fork(run, "b", parent="main", at=80)
    fork(run, "e", parent="main", at=0)
    assert [find_owning_branch(run, "b", step) for step in (0, 80, 81)] == ["main", "main", "b"]
    assert [find_owning_branch(run, "e", step) for step in (0, 1)] == ["main", "e"]


def test_a_name_that_is_taken_gets_a_number_or_is_refused(tmp_path):
    run = new_run(tmp_path)
    fork(run, "late", parent="main", at=40)
    (run.branches_folder / "late-2").mkdir()
    (run.branches_folder / "late-2" / "metrics.jsonl").touch()
    (run.branches_folder / "early").mkdir()  # killed before its segment
    (run.branches_folder / "early" / "recipe.yaml").touch()
    assert find_free_branch_name(run, "early", exact=True) == "early"
    assert find_free_branch_name(run, "late") == "late-3"
    with pytest.raises(NpoError, match="already has a branch 'late'"):
        find_free_branch_name(run, "late", exact=True)
    with pytest.raises(NpoError, match="cannot name"):
        find_free_branch_name(run, "../late")


def test_an_unknown_branch_is_answered_with_those_that_exist(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(NpoError, match="has no branch 'x'; it has: main"):
        ancestry(run, "x")


def test_a_run_without_segments_has_no_newest_branch(tmp_path):
    run = create_run(tmp_path / "run", recipe=RECIPE, npo_version="0.1.0")
    with pytest.raises(NpoError, match="nothing was trained"):
        find_newest_branch(run)


def test_a_circle_of_branches_is_damage(tmp_path):
    run = new_run(tmp_path)
    fork(run, "a", parent="b", at=1)
    fork(run, "b", parent="a", at=1)
    with pytest.raises(NpoError, match="descends from itself"):
        ancestry(run, "a")
