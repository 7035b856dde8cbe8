"""What surrounds `npo`: other processes, closed pipes, narrow terminals, foreign alphabets, folders without rights."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.cli_errors import SMALL, assert_refused, copy_run, folder_digests, json_rows, npo
from tests.helpers.warm_process import ForkServer, start_fork_server

COMMAND = [sys.executable, "-c", "from npo_cli.cli.main import main; main()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
NOBODY = 65534
LONG = [item.replace("num_steps=4", "num_steps=4000") for item in SMALL]


def process(*args: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen([*COMMAND, *map(str, args)], **({"env": ENVIRONMENT} | options))


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `npo` is this one."""
    start = f'npo() {{ {shlex.join(COMMAND)} "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", start], capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT | environment
    )


# Other processes


@pytest.fixture(scope="module")
def warm() -> Iterator[ForkServer]:
    with start_fork_server() as process:
        yield process


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} never result {text}"
        time.sleep(0.02)


def test_locked_run_is_read_but_not_written(tmp_path, warm):
    run = tmp_path / "busy run"
    child = warm.npo("train", "micro", str(run), *LONG, err=tmp_path / "err")
    try:
        wait_for(run / "branches" / "main" / "metrics.jsonl", '"step":3,')
        for args in (
            ["resume"],
            ["resume", "--at", "0", "--no-guide"],
            ["eval"],
            ["score-checkpoints", "--at", "0"],
            ["sample-guide", "--at", "0", "--source", "2"],
        ):
            result = npo(args[0], run, *args[1:])
            assert (result.code, result.out, result.err.count("\n")) == (2, "", 2 + (args[0] == "resume"))
            assert result.message.startswith(f"{run} is in use by process {child.pid} on ")
            assert result.hint == f"wait until it ends, or stop it with: kill {child.pid}"
        assert npo("index", run).code == npo("show", run).code == 0
    finally:
        child.kill()
        child.wait()
    # a dead process holds nothing
    assert npo("eval", run, "--step", "0").code == 0


def test_of_two_simultaneous_trainings_one_is_refused(tmp_path, warm):
    run = tmp_path / "run"
    child = warm.npo("train", "micro", str(run), *SMALL, err=tmp_path / "err")
    result = npo("train", "micro", run, *SMALL)
    codes = [child.wait(), result.code]
    assert sorted(codes) == [0, 2]
    err = (child.read_stderr(), result.err)[codes.index(2)]
    assert err.count("\n") == 2
    assert err.startswith(f"error: {run} ")
    steps = [row["step"] for row in json_rows(npo("index", run, "--json").out)]
    assert steps == [0, 2, 4]


# Streams


def test_closed_pipe_is_no_error(circle):
    run = shlex.quote(str(circle))
    for line in (f"npo index {run} --json", f"npo show {run} rollouts", "npo recipes micro"):
        done = shell(f"{line} | head -1; exit ${{PIPESTATUS[0]}}")
        assert (done.stderr, done.stdout.count("\n")) == ("", 1)
        assert done.returncode in (0, 1)


@pytest.mark.slow
def test_training_into_a_closed_pipe_stops_and_is_saved_as_after_a_signal(tmp_path):
    run = shlex.quote(str(tmp_path / "run"))
    settings = " ".join(item.replace("save_every=2", "save_every=1000") for item in LONG)
    done = shell(f"npo train micro {run} {settings} --json | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 130
    assert done.stdout.count("\n") == 1
    stopped = re.search(r"stopped by SIGPIPE after step (\d+), which is saved", done.stderr)
    assert stopped
    assert (tmp_path / f"run/branches/main/checkpoints/step_{int(stopped[1]):06d}/training_state").is_dir()
    # both streams into the pipe
    done = shell(f"npo resume {run} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout.count("\n")) == (130, 1)
    steps = [row["step"] for row in json_rows(npo("index", tmp_path / "run", "--json").out)]
    assert len(steps) == 3 and steps[2] > steps[1] == int(stopped[1])


def test_closed_streams_are_not_mixed(circle):
    run = shlex.quote(str(circle))
    assert shell(f"npo index {run} >&-").stderr == ""
    done = shell(f"npo show {run} --step 99 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_errors_go_to_stderr_and_with_json_to_stdout(circle):
    for args in (
        ["eval", circle, "--step", "3"],
        ["show", circle, "rollouts", "--step", "99"],
        ["train", "micro", "x", "train.lrr=1"],
        ["index", circle / "nowhere"],
    ):
        refused = assert_refused(*args, beside=circle.parent)
        (line,) = npo(*args, "--json").out.splitlines()
        assert json.loads(line) == {
            "record": "error",
            "error": refused.message,
            "hint": refused.hint,
            "exit_code": 2,
        }


# Terminals and alphabets


def on_terminal(*args: object, **environment: str) -> str:
    """What a terminal shows of a command."""
    master, slave = pty.openpty()
    plain = {name: value for name, value in ENVIRONMENT.items() if name != "NO_COLOR"}
    with process(*args, stdout=slave, stderr=slave, env=plain | {"TERM": "xterm"} | environment) as child:
        os.close(slave)
        shown = b""
        while chunk := chunk_of(master):
            shown += chunk
    os.close(master)
    assert child.returncode in (0, 2)
    return shown.decode()


def chunk_of(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # a terminal whose last writer has gone
        return b""


def test_narrow_terminal_splits_tables(circle):
    shown = on_terminal("index", circle, "--full", COLUMNS="40", NO_COLOR="1")
    assert "\x1b[3" not in shown
    *lines, last = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 40
    # a command is never broken
    assert last.startswith("next: npo ")
    for entry in json_rows(npo("index", circle, "--json").out):
        assert entry["digest"][:12] in shown


def test_errors_on_a_terminal_are_colored_unless_no_color(circle):
    assert "\x1b[31merror: there is no run directory nowhere" in on_terminal("show", "nowhere")
    assert "\x1b[31m" not in on_terminal("show", "nowhere", NO_COLOR="1")


def test_ascii_locale_reads_and_writes_non_ascii_paths(circle, tmp_path):
    run = copy_run(circle, tmp_path, "ein Läufchen")
    done = shell(f"cd {shlex.quote(str(tmp_path))}; npo show 'ein Läufchen' --step 99", LC_ALL="C", LANG="C")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1].endswith("npo show 'ein Läufchen' metrics")
    done = shell(f"npo index {shlex.quote(str(run))}", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_work_without_a_home_folder(circle):
    assert shell(f"unset HOME; npo index {shlex.quote(str(circle))}").returncode == 0


NASTY = "\x1b]0;owned\x07\x1b[2J[red]1[/red]\u202e+2=\r\n\u2066"


def test_prompts_and_responses_cannot_control_the_terminal(tmp_path):
    rows = [
        {"prompt": f"{NASTY}{number}", "answer": f"{number}\x1b[31m", "id": f"p{number}\u202e"} for number in range(30)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ("task.source=file", f"task.path={tmp_path / 'd.jsonl'}", "task.verifier=exact", "task.id_column=id")
    assert npo("train", "micro", tmp_path / "run", *SMALL, *task).code == 0
    for what in ("rollouts", "groups"):
        shown = npo("show", tmp_path / "run", what).out
        assert not set(shown) & {"\x1b", "\x07", "\r", "\u202e", "\u2066"}
        assert "\\u202e" in shown
        for line in npo("show", tmp_path / "run", what, "--json").out.splitlines():
            assert line.isascii()
            json.loads(line)
    shown = npo("show", tmp_path / "run", "rollouts", "--full").out
    assert "\\x1b]0;owned\\x07\\x1b[2J[red]1[/red]" in shown
    result = assert_refused("show", tmp_path / "run", "rollouts", "--prompt", "\x1b[31m", beside=tmp_path)
    assert "\x1b" not in result.err


# Rights


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user to whom nothing belongs; nothing to do for one who is not root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def opened_up(folder: Path) -> None:
    """Let another user as far as this folder."""
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)


def test_missing_permissions_are_reported(circle, tmp_path):
    opened_up(tmp_path)
    secret = copy_run(circle, tmp_path, "secret")
    secret.chmod(0)
    tmp_path.chmod(0o555)
    try:
        with without_rights():
            for args in (["index"], ["show"], ["resume"], ["eval"]):
                result = npo(args[0], secret)
                assert (result.code, result.out, result.err.count("\n")) == (2, "", 2)
                assert result.message.startswith(f"Permission denied: {secret}")
            result = npo("train", "micro", tmp_path / "new")
            assert result.message == f"cannot make {tmp_path / 'new'}: {tmp_path} may not be written in"
            assert npo("train", "micro", secret / "new").code == 2
    finally:
        tmp_path.chmod(0o755)
        secret.chmod(0o755)


@pytest.mark.slow
def test_read_only_run_is_listed_and_shown(circle, tmp_path):
    opened_up(tmp_path)
    run = copy_run(circle, tmp_path)
    pass
    (run / ".lock").unlink()
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = folder_digests(run)
    try:
        with without_rights():
            assert npo("index", run).out.startswith("Checkpoints\n")
            assert npo("show", run).code == 0
            result = npo("eval", run)
            assert (result.code, result.message) == (2, f"cannot write in {run}: Permission denied")
        assert folder_digests(run) == before
    finally:
        for path in (run, *run.rglob("*")):
            path.chmod(0o755)
