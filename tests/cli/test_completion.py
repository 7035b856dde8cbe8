"""What Tab offers, as the completion scripts of bash ask for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npo_cli.cli.completion import offers
from npo_cli.config.locate import list_method_names, list_recipe_names

RUN = """
import json, sys
from npo_cli.cli.main import main
try:
    main()
finally:
    print(json.dumps([name for name in ("torch", "transformers", "numpy") if name in sys.modules]), file=sys.stderr)
"""


def complete(*words: object, cwd: Path | None = None) -> list[str]:
    """What is offered for the last word; nothing heavy is imported, and nothing is written to the terminal."""
    line = ["npo", *map(str, words)]
    environment = os.environ | {
        "_NPO_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=cwd
    )
    assert json.loads(done.stderr) == []
    return done.stdout.split()


@pytest.fixture
def run(circle: Path, tmp_path: Path) -> Path:
    """A name without blanks: bash splits the line before it asks."""
    link = tmp_path / "run"
    link.symlink_to(circle)
    return link


def test_recipes_methods_and_recipe_files(tmp_path):
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "minor").mkdir()
    assert complete("train", "mi", cwd=tmp_path) == [
        *(name for name in list_recipe_names() if name.startswith("mi")),
        *("mine.yaml", "minor/"),
    ]
    assert complete("train", "micro", "--method", "controls/") == [
        name for name in list_method_names() if name.startswith("controls/")
    ]


def test_settings_with_their_equals_sign():
    assert complete("train", "micro", "out", "train.l") == ["train.lr=", "train.logit_chunk_tokens="]
    assert complete("config", "train.num_s") == ["train.num_steps"]


def test_branches_guides_and_steps_of_the_run(run):
    branches = sorted(folder.name for folder in (run / "branches").iterdir())
    assert complete("resume", run, "--branch", "") == branches
    assert complete("resume", run, "--guide", "n") == ["near"]
    steps = complete("resume", run, "--at", "")
    assert steps == sorted(
        {path.name.removeprefix("step_").lstrip("0") or "0" for path in run.rglob("step_*")}, key=int
    )
    assert complete("score-checkpoints", run, "--candidates", f"{steps[0]},") == [
        f"{steps[0]},{step}" for step in steps[1:]
    ]
    assert complete("sample-guide", run, "--source", "pa") == ["past"]


def test_without_a_run_nothing_is_offered(tmp_path):
    assert complete("resume", tmp_path / "nope", "--at", "") == []


def test_a_callback_never_raises():
    @offers
    def fail(ctx, incomplete):
        raise RuntimeError

    assert fail(None, "") == []


def test_options_of_every_command_that_name_something_recorded_are_completed():
    from npo_cli.cli.commands import COMMANDS, load_command

    lacking = [
        (name, option.name)
        for name in COMMANDS
        for option in load_command(name).params
        if option.name in ("branch", "guide", "method") and option._custom_shell_complete is None
    ]
    assert lacking == []
