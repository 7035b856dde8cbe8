"""log.txt: what commands said, one line each, whatever happens to them or to the disk."""

import re
from pathlib import Path

import pytest

from npo_cli.api_key import KEY_VARIABLE
from npo_cli.errors import NpoError, StoppedEarly
from npo_cli.storage import text_log
from npo_cli.storage.layout import RunDir, create_run
from npo_cli.storage.lock import lock_run
from npo_cli.storage.text_log import forget_waiting_lines, log_message
from npo_cli.storage.verify import verify_run
from npo_cli.types.views import Damage

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 (start|notice|warning|stopped|error|end) ?.*")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    forget_waiting_lines()
    return create_run(tmp_path / "run", recipe={}, npo_version="1")


def read_log(run: RunDir) -> list[str]:
    """Every line without its time."""
    lines = run.text_log_path.read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    return [" ".join(line.split()[1:]) for line in lines]


def test_log_has_start_messages_and_end(run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/npo", "train", "micro", "x"])
    log_message("resume branch main", level="info")  # before the run is held
    with lock_run(run):
        log_message("two\nlines \x1b[0m", level="info")
        log_message("odd", level="warning")
    start, *rest = read_log(run)
    assert re.fullmatch(r"start npo \S+, process \d+: npo train micro x", start)
    assert rest == [
        "notice resume branch main",
        r"notice two\nlines \x1b[0m",
        "warning odd",
        "end",
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NpoError("no guide", "npo sample-guide"), "error no guide; try: npo sample-guide"),
        (StoppedEarly("stopped by SIGINT after step 3"), "stopped stopped by SIGINT after step 3"),
        (ValueError("a\nb"), "error ValueError: a"),
        (KeyboardInterrupt(), "stopped before its end"),
    ],
)
def test_log_has_how_a_command_ended(run, error, line):
    with pytest.raises(type(error)), lock_run(run):
        raise error
    assert read_log(run)[-1] == line


def test_log_only_grows(run):
    with lock_run(run):
        pass
    before = run.text_log_path.read_bytes()
    with lock_run(run):
        pass
    assert run.text_log_path.read_bytes().startswith(before)
    assert len(read_log(run)) == 4


def test_log_that_cannot_be_written_fails_nothing(run):
    run.text_log_path.mkdir()
    with lock_run(run):
        log_message("hello", level="info")
    assert list(run.text_log_path.iterdir()) == []


def test_part_of_a_line_is_taken_back_on_a_full_disk(run, monkeypatch):
    with lock_run(run):
        pass
    before = run.text_log_path.read_bytes()
    write = text_log.os.write
    monkeypatch.setattr(text_log.os, "write", lambda handle, data: write(handle, data[:5]))
    with lock_run(run):
        log_message("hello", level="info")
    assert run.text_log_path.read_bytes() == before


def test_log_is_not_verified_and_has_no_key(run, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "very-secret")
    with lock_run(run):
        log_message("401 for very-secret", level="warning")
    assert "warning 401 for [key]" in read_log(run)
    run.text_log_path.write_bytes(b"\xff\x00")
    assert not [one for one in verify_run(run.root) if isinstance(one, Damage) and "log.txt" in one.message]
