"""`npo ls` on runs that are finished, interrupted, held by a process, and damaged."""

import os
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.layout import open_run
from npo_cli.storage.lock import lock_run
from npo_cli.storage.run_list import describe_run, list_runs
from tests.helpers.runs import copy_run


def test_listing_of_runs_at_any_depth(scout, tmp_path):
    copy_run(scout, tmp_path / "a")
    copy_run(scout, tmp_path / "deep/er/b")
    (tmp_path / ".hidden").mkdir()
    copy_run(scout, tmp_path / ".hidden/c")
    first, second = list_runs(tmp_path)
    assert (first.run, second.run) == (str(tmp_path / "a"), str(tmp_path / "deep/er/b"))
    assert (first.recipe, first.branches, first.step, first.num_steps) == ("micro", ("main",), 4, 4)
    assert first.state == "finished"
    assert first.size_bytes == sum(path.stat().st_size for path in Path(first.run).rglob("*") if path.is_file())


def test_listing_names_the_process_that_holds_a_run(scout, tmp_path):
    root = copy_run(scout, tmp_path / "a")
    with lock_run(open_run(root)):
        held = describe_run(root)
    assert (held.state, held.note.startswith(f"process {os.getpid()} on ")) == ("running", True)
    assert describe_run(root).state == "finished"


def test_listing_of_a_damaged_run_says_what_is_damaged(scout, tmp_path):
    root = copy_run(scout, tmp_path / "a")
    (root / "segments.jsonl").write_text("{}\n")
    (only,) = list_runs(tmp_path)
    assert only.state == "damaged"
    assert "segments.jsonl is damaged" in only.note


def test_listing_of_a_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(NpoError, match="there is no folder"):
        list(list_runs(tmp_path / "nope"))
