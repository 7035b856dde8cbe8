"""Which branch `npo resume` continues, on real runs that are trained, forked and left in the middle."""

from pathlib import Path

import pytest

from npo_cli.storage.interrupted import find_resume_target, list_interrupted_branches
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import append_segment
from npo_cli.training.resume import resume_run
from npo_cli.types.rollouts import Segment
from tests.helpers.runs import copy_run, stop_after, train


def resume(root: Path, **options):
    fields = {"overrides": (), "at": None, "guide": None, "source_branch": None, "new_branch": None, "steps": None}
    return resume_run(root, **fields | options)


def targets(root: Path) -> tuple[str, list[str]]:
    run = open_run(root)
    return find_resume_target(run).branch, list_interrupted_branches(run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps of main, all done."""
    root = tmp_path_factory.mktemp("interrupted") / "run"
    train(root)
    return root


def test_resume_target_of_a_finished_run_is_main(finished):
    assert targets(finished) == ("main", [])


def test_resume_target_is_the_branch_that_was_interrupted(finished, tmp_path):
    root = copy_run(finished, tmp_path / "run")
    stop_after(resume(root, at=2, new_branch="left"), 3)
    assert targets(root) == ("left", ["left"])
    # a branch that is trained later, to its end, does not take its place
    list(resume(root, at=2, new_branch="whole"))
    assert targets(root) == ("left", ["left"])
    list(resume(root))
    assert targets(root) == ("main", [])


def test_resume_target_is_not_a_branch_that_ended_at_until(finished, tmp_path):
    root = copy_run(finished, tmp_path / "run")
    list(resume(root, at=2, new_branch="short", until=3))
    assert targets(root) == ("main", [])


def test_resume_target_is_interrupted_from_its_segment_on(finished, tmp_path):
    root = copy_run(finished, tmp_path / "run")
    run = open_run(root)
    # killed between the line of segments.jsonl and the event
    run.save_recipe("late", run.read_recipe("main"))
    append_segment(run, Segment(branch="late", parent="main", fork_step=2, guide_cache=None, guide_until=None))
    assert targets(root) == ("late", ["late"])
    assert find_resume_target(run).describe() == "resume branch late: interrupted at step 2 of 4"


def test_resume_target_of_two_interrupted_branches_is_the_last_started(finished, tmp_path):
    root = copy_run(finished, tmp_path / "run")
    stop_after(resume(root, at=0, new_branch="a"), 1)
    stop_after(resume(root, at=2, new_branch="b"), 3)
    assert targets(root) == ("b", ["a", "b"])
    assert find_resume_target(open_run(root)).describe().endswith("; also interrupted: a (--branch NAME)")


def test_resume_target_is_not_a_branch_that_autonpo_left(watched):
    run = open_run(watched)
    assert list_interrupted_branches(run) == []
