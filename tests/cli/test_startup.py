"""What is imported before it is needed, and how the process leaves, seen from outside."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys

import pytest

from npo_cli.cli.commands import COMMANDS
from npo_cli.cli.terminal import CLEAR_LINE
from tests.helpers.cli_errors import SMALL, npo

HEAVY = ("torch", "transformers", "numpy", "pydantic", "matplotlib", "scipy", "rich", "yaml")
RUN = "from npo_cli.cli.main import main; main()"
WATCHED = f"""
import atexit, json, sys
heavy = {HEAVY!r}
atexit.register(lambda: print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr))
{RUN}
"""


def launched(*args: str, code: str = RUN, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


@pytest.mark.parametrize(
    ("args", "code"),
    [(["--help"], 0), (["train", "--help"], 0), (["--version"], 0), (["train"], 2), (["bogus"], 2), ([], 2)],
)
def test_help_and_usage_errors_import_nothing_heavy(args, code):
    result = launched(*args, code=WATCHED)
    assert result.returncode == code
    # pydantic is typer's own way to read arguments; it takes 0.05 s
    assert set(json.loads(result.stderr.splitlines()[-1])) <= {"pydantic"}


@pytest.mark.parametrize("args", [["train", "micro", "new", "train.lrr=1"], ["resume", "new"]])
def test_bad_settings_are_reported_without_torch(args):
    result = launched(*args, code=WATCHED)
    assert result.returncode == 2
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(json.loads(result.stderr.splitlines()[-1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps with checkpoints at 0, 2 and 4."""
    root = tmp_path_factory.mktemp("startup") / "run"
    assert npo("train", "micro", root, *SMALL).code == 0
    return root


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        ("resume", ("--guide", "late"), "--guide needs --at STEP"),
        ("resume", ("--new-branch", "other"), "--new-branch needs --at STEP"),
        ("resume", ("--at", "2", "--guide", "late"), "late"),
        ("resume", ("--at", "3", "--no-guide"), "step 3"),
        ("resume", (), "has completed step 4 of 4"),
        ("resume", ("--autonpo", "--at", "3"), "step 3"),
        ("score-checkpoints", ("--at", "4"), "no checkpoint later than step 4"),
        ("sample-guide", ("--at", "2", "--source", "2"), "not later"),
        ("sample-guide", ("--at", "2", "--source", "4", "--name", "../x"), "../x"),
        ("replay", ("--at", "3"), "step 3"),
        ("eval", ("--step", "3"), "step 3"),
    ],
)
def test_options_are_refused_at_once_without_torch(run, command, args, words):
    result = launched(command, str(run), *args, code=WATCHED)
    assert result.returncode == 2
    first, *_, imported = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert words in first
    assert not {"torch", "transformers"} & set(json.loads(imported))


def test_reader_that_closes_the_pipe_is_no_error():
    command = f'"{sys.executable}" -c "{RUN}" recipes micro --json | true; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stderr == ""
    assert result.returncode in (0, 1)


def test_errors_without_a_terminal_have_no_color():
    result = launched("train", "nope", "new")
    assert (result.returncode, result.stdout) == (2, "")
    assert "\x1b" not in result.stderr
    assert result.stderr.count("\n") == 2


DRAWN = """
from npo_cli.cli.output import print_records
from npo_cli.types.rollouts import Notice, Progress, Segment

def stage():
    yield Notice(message="[bold]hello\\x1b]0;title\\x07")
    yield Progress(description="work", done=1, total=2, note="[red]note")
    yield Segment(branch="main", parent=None, fork_step=0, guide_cache=None, guide_until=None)
    yield Progress(description="work", done=2, total=2, note="[red]note")

print_records(stage(), as_json=True)
"""


def on_a_terminal(*, stdout_too: bool) -> tuple[str, str]:
    """What a pipe on stdout and a terminal on stderr (or on both) receive."""
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", DRAWN], stdout=slave if stdout_too else subprocess.PIPE, stderr=slave, env=environment
    )
    os.close(slave)
    piped = "" if stdout_too else process.stdout.read().decode()
    shown = b""
    # a terminal whose last writer has gone gives an error instead of an end
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert process.wait(timeout=60) == 0
    return piped, shown.decode()


def test_progress_bars_on_stderr_do_not_touch_json_on_stdout():
    piped, shown = on_a_terminal(stdout_too=False)
    assert json.loads(piped)["branch"] == "main"
    assert "work" in shown
    assert "2/2" in shown
    assert "[bold]hello\\x1b]0;title\\x07" in shown
    assert "[red]note" in shown
    assert "main" not in shown


def test_json_on_a_terminal_is_not_mixed_with_bars():
    _, shown = on_a_terminal(stdout_too=True)
    lines = shown.splitlines()
    assert lines[0] == "[bold]hello\\x1b]0;title\\x07"
    assert lines[1] == "work 1/2  [red]note"
    assert json.loads(lines[2])["branch"] == "main"
    assert "\x1b" not in shown


def test_help_imports_no_command():
    """`npo --help` is as fast as typer: a command's module is imported when the command runs."""
    code = (
        "import sys\nfrom npo_cli.cli.main import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stderr.split() if name.startswith("npo_cli.cli.")}
    assert loaded == {f"npo_cli.cli.{name}" for name in ("main", "commands", "completion", "options", "terminal")}
    assert "pydantic" not in done.stderr.split()


def on_one_terminal(*args: str, **environment: str) -> str:
    """What a terminal receives from stdout and stderr of a command."""
    master, slave = pty.openpty()
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"} | environment
    process = subprocess.Popen([sys.executable, "-c", RUN, *args], stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    process.wait(timeout=60)
    return shown.decode()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("train", "micro", "new", "train.lrr=1"), "error: "),
        (("recipes",), "micro"),
        (("config", "train.lr"), "train.lr"),
        (("docs", "glossary"), "rollout"),
    ],
)
def test_loading_line_comes_first_and_is_erased_before_anything_else(args, words):
    shown = on_one_terminal(*args)
    assert shown.startswith("loading ...\r\x1b[2K")
    assert words in shown
    assert shown.count("loading ...") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("train", "micro", "new", "train.lrr=1", "--quiet"),
        ("train", "micro", "new", "train.lrr=1", "--json"),
        ("train", "--help"),
        ("--version",),
    ],
)
def test_no_loading_line_in_quiet_json_and_help(args):
    assert "loading ..." not in on_one_terminal(*args)


def test_no_color_and_force_color_decide_over_the_terminal():
    plain = on_one_terminal("show", "new", NO_COLOR="1")
    assert "\x1b[31m" not in plain
    assert "\x1b[31merror: " in on_one_terminal("show", "new")
    assert "\x1b[31merror: " in launched("show", "new", FORCE_COLOR="1").stderr
    assert "\x1b" not in launched("show", "new", FORCE_COLOR="1", NO_COLOR="1").stderr


def test_errors_on_a_terminal_are_cut_between_words_and_their_commands_are_not(run):
    shown = on_one_terminal("resume", str(run), "--at", "2", COLUMNS="40").replace(CLEAR_LINE, "\n")
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in shown.splitlines()]
    begin = next(place for place, line in enumerate(lines) if line.startswith("error: "))
    *message, hint = lines[begin:]
    assert len(message) > 2
    assert max(map(len, message)) <= 40
    again = f"npo resume {run} --at 2"
    assert hint == f"  try: {again} --guide NAME, or {again} --no-guide"


ALL_COMMANDS = """
import json, sys
from npo_cli.cli import main as entry
from npo_cli.cli.commands import COMMANDS

loaded = {}
for name, command in COMMANDS.items():
    module = "npo_cli.cli." + command.target.partition(":")[0]
    entry.show_loading = lambda: loaded.setdefault(name, module in sys.modules)
    try:
        entry.main([name, "--no-such-option"])
    except SystemExit:
        loaded[name] = [loaded.get(name), module in sys.modules]
print(json.dumps(loaded))
"""


def test_every_command_says_that_it_loads_before_its_module_is_imported():
    """The module is not imported when the line is shown, and is after it."""
    loaded = json.loads(launched(code=ALL_COMMANDS).stdout)
    assert loaded == {name: [False, True] for name in COMMANDS}
