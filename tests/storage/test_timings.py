"""Wall clock on disk: what was done twice counts twice, what was never timed counts nothing."""

import json

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.metrics import append_sampling_time, read_step_seconds, sampling_timings_path, sum_sampling_seconds
from tests.storage.builders import new_run


def test_every_chunk_leaves_a_line_of_its_own(tmp_path):
    folder = tmp_path / "cache"
    append_sampling_time(folder, 1.5, num_tokens=40)
    append_sampling_time(folder, 0.25, num_tokens=0)
    rows = [json.loads(line) for line in sampling_timings_path(folder).read_text().splitlines()]
    assert all(row.pop("time").endswith("+00:00") for row in rows)
    assert rows == [{"seconds": 1.5, "num_tokens": 40}, {"seconds": 0.25, "num_tokens": 0}]
    assert sum_sampling_seconds(folder) == 1.75


def test_a_folder_that_was_never_timed_counts_nothing(tmp_path):
    assert sum_sampling_seconds(tmp_path / "older") == 0


def test_a_torn_line_counts_nothing_and_the_next_chunk_cuts_it_off(tmp_path):
    append_sampling_time(tmp_path, 2.0, num_tokens=1)
    path = sampling_timings_path(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"time":"2026-11-23T07:30:00+00:00","seconds":3')
    assert sum_sampling_seconds(tmp_path) == 2.0
    append_sampling_time(tmp_path, 0.5, num_tokens=1)
    assert sum_sampling_seconds(tmp_path) == 2.5


def test_a_step_executed_again_has_the_sum_of_its_times(tmp_path):
    run = new_run(tmp_path)
    journal = JsonlLog(run.timings_path("main"))
    # Killed after step 2, gone on with from the anchor of step 1; the last line is of an npo that timed nothing.
    for step, timings in ((1, {"seconds": 4.0}), (2, {"seconds": 8.0}), (2, {"seconds": 0.5}), (3, {})):
        journal.append({"step": step, "branch": "main", **timings})
    assert read_step_seconds(run, "main") == {1: 4.0, 2: 8.5, 3: 0.0}
    # The branch's folder counts all of them: 4 + 8 + 0.5
    assert sum_sampling_seconds(run.branch_folder("main")) == 12.5
    assert read_step_seconds(run, "never") == {}


def test_seconds_that_are_no_number_are_damage(tmp_path):
    append_sampling_time(tmp_path, 1.0, num_tokens=1)
    JsonlLog(sampling_timings_path(tmp_path)).append({"seconds": "long"})
    with pytest.raises(NpoError, match=r"timings\.jsonl, line 2 is damaged: seconds is 'long'"):
        sum_sampling_seconds(tmp_path)
