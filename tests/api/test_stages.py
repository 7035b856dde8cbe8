"""Stages: a call runs, a stream yields; neither can be disturbed by what the program does in between. No torch."""

import gc
import inspect
import logging
import random
import warnings
from collections.abc import Generator

import numpy
import pytest

from npo_cli.api.stages import RecordStream, collect_records, returns
from npo_cli.types.rollouts import Notice, Progress, StepReport

PROGRESS = Progress(description="sampling", done=1, total=2)
WARNING = Notice(message="odd settings", level="warning")


def _count(stream: RecordStream) -> int:
    return len(collect_records(stream))


@returns(_count)
def work(records: list) -> RecordStream:
    """Yield these records."""
    return RecordStream((record for record in records), name="work")


def draws(seed: int, count: int) -> Generator[StepReport, None, None]:
    """Steps whose reward comes from the global random streams, seeded at the start as training does."""
    random.seed(seed)
    numpy.random.seed(seed)
    for step in range(1, count + 1):
        yield StepReport(
            branch="main", step=step, metrics={"reward": random.random() + numpy.random.rand()}, timings={}
        )


def test_a_call_runs_the_stage_and_returns_its_result(caplog):
    with caplog.at_level(logging.INFO, logger="npo_cli"):
        assert work([PROGRESS, WARNING, 1]) == 2  # without progress
    assert [(one.levelname, one.message) for one in caplog.records] == [("WARNING", "odd settings")]


def test_a_stream_yields_every_record():
    assert list(work.stream([PROGRESS, WARNING, 1])) == [PROGRESS, WARNING, 1]


def test_a_stream_that_is_never_read_is_reported():
    with pytest.warns(RuntimeWarning, match=r"npo\.work\.stream\(\.\.\.\) was never iterated: nothing was done"):
        work.stream([1])
        gc.collect()


def test_a_stream_that_is_read_or_closed_is_not_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(work.stream([1]))
        work.stream([1]).close()
        gc.collect()


def test_a_stage_has_the_signature_and_text_of_its_function():
    assert str(inspect.signature(work)) == "(records: list) -> int"
    assert work.__doc__ == "Yield these records."
    assert "iterate npo.work.stream" in repr(work)


def test_the_programs_random_numbers_do_not_change_what_is_computed():
    expected = [record.metrics["reward"] for record in draws(5, 4)]
    found = []
    for record in RecordStream(draws(5, 4), name="draws"):
        found.append(record.metrics["reward"])
        random.seed(0)
        numpy.random.rand(3)
    assert found == expected


def test_a_stage_leaves_the_programs_random_numbers_alone():
    random.seed(1)
    expected = [random.random() for _ in range(3)]
    random.seed(1)
    found = [random.random() for _ in RecordStream(draws(5, 3), name="draws")]
    assert found == expected


def test_a_changed_record_does_not_reach_the_stage():
    shared = StepReport(branch="main", step=1, metrics={"reward": 0.5}, timings={})
    for record in RecordStream((one for one in [shared]), name="work"):
        record.metrics["reward"] = 9.0
    assert shared.metrics == {"reward": 0.5}


def test_closing_a_stream_runs_the_clean_up():
    closed = []

    def records() -> Generator[int, None, None]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    stream = RecordStream(records(), name="work")
    assert next(stream) == 1
    stream.close()
    assert closed == [True]
    assert list(stream) == []
