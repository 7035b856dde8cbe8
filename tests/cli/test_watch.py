"""`npo watch`: the curves of a run, while another process writes to it."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npo_cli.report.watch import find_writer, read_curves
from npo_cli.storage.layout import open_run
from npo_cli.storage.lock import lock_run
from tests.helpers.cli_errors import npo

WRITER = """
import sys, time
from pathlib import Path
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lock import lock_run
with lock_run(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}


@pytest.fixture(autouse=True)
def size_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "30")


def test_one_frame_has_three_plots_of_every_branch_in_80_columns(circle):
    result = npo("watch", circle, "--once")
    lines = result.out.splitlines()
    assert result.code == 0
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 30
    headings = [line for line in lines if line.startswith(("reward", "entropy", "held-out"))]
    assert [line.split("  ")[0] for line in headings] == [
        "reward (moving average)",
        "entropy (moving average)",
        "held-out accuracy",
    ]
    assert "no command is writing to it" in lines[0]
    assert "\x1b" not in result.out
    for curve in read_curves(open_run(circle)):
        assert f"  {curve.branch} {curve.rewards[-1][1]:.3f}" in headings[0]


def test_json_has_the_recorded_points(circle):
    found = [json.loads(line) for line in npo("watch", circle, "--branch", "main", "--json").out.splitlines()]
    (curve,) = found
    rows = [json.loads(line) for line in (circle / "branches/main/metrics.jsonl").read_text().splitlines()]
    assert curve["record"] == "branch_curve"
    assert curve["rewards"] == [[row["step"], row["reward_ema"]] for row in rows]


def test_color_where_it_is_forced(circle, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[36m" in npo("watch", circle, "--once").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in npo("watch", circle, "--once").out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--branch", "none"), "no branch"),
        (("--every", "0"), "--every must be at least 0.2 seconds"),
    ],
)
def test_bad_options_are_refused(circle, args, words):
    result = npo("watch", circle, *args)
    assert result.code == 2
    assert words in result.err


def test_writer_of_a_run_is_found_while_it_lives(circle):
    run = open_run(circle)
    assert find_writer(run) is None
    with lock_run(run):
        assert find_writer(run).pid == os.getpid()
        text = run.holder_path.read_text()
    # what a killed process leaves
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    run.holder_path.write_text(
        text.replace(f'"pid": {os.getpid()}', f'"pid": {dead.pid}').split(',\n "checksum')[0] + "}"
    )
    try:
        assert find_writer(run) is None
    finally:
        run.holder_path.unlink()


def watch_on_a_terminal(run: Path) -> tuple[subprocess.Popen, int]:
    master, slave = pty.openpty()
    code = "from npo_cli.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "watch", str(run), "--every", "0.2"], stdout=slave, stderr=slave, env=ENVIRONMENT
    )
    os.close(slave)
    return process, master


def read_until(master: int, words: bytes, *, count: int) -> bytes:
    shown = b""
    deadline = time.monotonic() + 30
    while shown.count(words) < count:
        assert time.monotonic() < deadline, shown
        shown += os.read(master, 65536)
    return shown


def read_rest(master: int) -> bytes:
    """What is left until the program ends; a terminal whose last writer has gone gives an error instead of an end."""
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 65536):
            shown += chunk
    return shown


@pytest.mark.parametrize("by", ["end of the writer", "Ctrl-C"])
def test_watch_draws_again_until_the_writer_ends_or_ctrl_c(circle, by):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(circle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as writer:
        assert writer.stdout.readline() == b"held\n"
        process, master = watch_on_a_terminal(circle)
        read_until(master, b"entropy", count=2)
        if by == "Ctrl-C":
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        writer.stdin.close()
        writer.wait()
        if by != "Ctrl-C":
            assert b"no command is writing to it" in read_rest(master)
            assert process.wait(timeout=30) == 0
    os.close(master)
