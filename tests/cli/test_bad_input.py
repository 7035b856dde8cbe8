"""Slips in what is typed and in recipes: told in two lines, at once, with nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli_errors import assert_refused

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "scipy")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(folder: Path, *overrides: str, recipe: str = "micro") -> str:
    """The words of a training that must not begin."""
    result = assert_refused("train", recipe, "new", *overrides, beside=folder)
    return f"{result.message} | {result.hint}"


# The command line


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?", "npo --help"),
        (["train"], "Missing argument 'RECIPE'.", "npo train --help"),
        (["train", "micro", "a", "--run", "b"], "the run directory is given twice: a and --run b", "--run b   #"),
        (["train", "micro", ""], "the run directory is an empty name", "npo train micro runs/first"),
        (["train", "micro", "--run"], "Option '--run' requires an argument.", "npo train --help"),
        (["doctor", "b"], "Got unexpected extra argument(s) (b)", "npo doctor --help"),
        (["index", "a", "b"], "KEY=VALUE needs --import", "npo index a --import FOLDER --recipe RECIPE"),
        (["show", "a", "--limit", "0"], "Invalid value for '--limit': Input should be greater", "npo show --help"),
        (["resume", "a", "--at", "two"], "Invalid value for '--at': Input should be a valid", "npo resume --help"),
        (["train", "micro", "--run", "x", "--json=3"], "Option '--json' does not take a value.", "npo train --help"),
        (["index", "a\0b"], "Invalid value for 'RUN'", "npo index --help"),
    ],
)  # fmt: skip
def test_usage_error_names_the_argument_and_the_help(folder, args, message, hint):
    result = assert_refused(*args, beside=folder)
    assert result.message.startswith(message)
    assert result.hint.startswith(hint)


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["base"], "there is no command base", "python recipes/make_micro_base.py"),
        (["resume", "R", "--from", "b"], "npo resume has no option --from: use --branch b", "npo resume --help"),
        (["compare", "R", "--csv", "a.csv"], "npo compare has no option --csv: use --out a.csv", "npo compare --help"),
        (["report", "R", "--pictures", "d"], "npo report has no option --pictures: use --figures d", "npo report --h"),
        (["index", "R", "--base"], "npo index has no option --base: use --with-base", "npo index --help"),
    ],
)
def test_old_command_or_option_is_answered_with_the_new_one(folder, args, message, hint):
    error = assert_refused(*args, beside=folder)
    assert error.message.startswith(message)
    assert error.hint.startswith(hint)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr", "'lr' is not a setting: write KEY=VALUE | train.lr=3e-4"),
        ("train.lr: 3", "is not a setting: write KEY=VALUE"),
        ("=5", "'=5' is not a setting: write KEY=VALUE"),
        ("train..lr=5", "'train..lr=5' is not a setting: write KEY=VALUE"),
        ("", "'' is not a setting: write KEY=VALUE"),
        ("train.lr=[", "the value of train.lr:1: expected the node content"),
        ("train.lr=*x", "the value of train.lr:1: aliases are not part of a recipe"),
        ("train={lr: 1, lr: 2}", "the value of train:1: the key lr is given twice"),
        ("train.lr=!!int x", "the value of train.lr: a value does not fit its !!tag"),
        ("name=!!python/object:os.system x", "could not determine a constructor for the tag"),
        ("train.lr=" + "[" * 5000, "the value of train.lr: nested too deeply"),
        ("name=\udcff", "the value of name: unacceptable character"),
        ("train.seed=" + "9" * 5000, "the value of train.seed: a value does not fit"),
        ("train.\x1b[31mlr=3", "train.\\x1b[31mlr is not a setting"),
    ],
)
def test_malformed_override_is_refused(folder, override, words):
    assert words in training(folder, override)


# Recipes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.lr=1", "trian is not a setting (command line) | write train instead of trian"),
        ("train.lrr=1", "train.lrr is not a setting (command line) | write train.lr instead of train.lrr"),
        ("lr=1", "lr is not a setting (command line) | write train.lr instead of lr"),
        ("train.zzz=1", "train.zzz is not a setting (command line) | train has the settings seed, num_steps"),
        ("task.datasets=[{name: x, wieght: 3}]", "task.datasets.0.wieght is not a setting"),
        ("train.lr=fast", 'train.lr must be a number above 0, got "fast"'),
        ("train.lr=.nan", "train.lr must be a number above 0, got NaN"),
        ("train.num_steps=2.5", "train.num_steps must be a whole number at least 1, got 2.5"),
        ("train.betas=[0.9, 1]", "train.betas.1 must be a number at least 0 and below 1, got 1"),
        ("train.group_size=1", "train.group_size must be a whole number at least 2, got 1"),
        (
            "guide.inject.max_accuracy=1.5",
            "guide.inject.max_accuracy must be a number at least 0 and at most 1, got 1.5",
        ),
        ("loss.kind=ppo", "loss.kind must be one of grpo, gspo, gspo_token, cispo"),
        ("train=null", "train must be a group of settings (KEY: VALUE), got null"),
        ("train.num_updates=3", "train.num_updates must divide train.prompts_per_step"),
        ("task.pool_size=2", "task.pool_size must be at least train.prompts_per_step"),
        ("sampling.overlong_buffer=99", "sampling.overlong_buffer must not exceed sampling.max_new_tokens"),
        ("task.source=file", "task.source=file needs a file"),
    ],
)
def test_unknown_or_invalid_setting_is_refused_with_what_is_allowed(folder, override, words):
    assert words in training(folder, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lr: 1}\nname: x\ntrain: {seed: 3}\n", "r.yaml:3: the key train is given twice"),
        ("train:\n  lr: 1\n seed: 2\n", "r.yaml:3: "),
        ("train:\n\tlr: 1\n", "r.yaml:2: found character '\\t' that cannot start any token"),
        ("train:\n  lr: 3e-4\n  lrr: 3\n", "train.lrr is not a setting (r.yaml:3)"),
        ("- a\n- b\n", "r.yaml holds no settings (KEY: VALUE)"),
        ("", "r.yaml is empty"),
        ("# only talk\n", "r.yaml is empty"),
        ("extends: nowhere\n", "there is no shipped recipe named 'nowhere'"),
        ("extends: r.yaml\n", "recipes extend each other in a cycle"),
        ("name: a\n---\nname: b\n", "r.yaml:2: but found another document"),
    ],
)
def test_malformed_recipe_file_error_names_the_line(folder, text, words):
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    assert words in training(folder, recipe="./r.yaml")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("micr", "no shipped recipe named 'micr' (a file needs its suffix: micr.yaml) | npo recipes micro "),
        ("micro-spare", "| npo recipes micro-sparse "),
        ("micro.yaml", "there is no recipe file micro.yaml | npo recipes "),
        ("../nope.yaml", "there is no recipe file ../nope.yaml"),
        ("/", "there is no recipe file /"),
        ("", "there is no shipped recipe named ''"),
        ("x" * 300, "File name too long"),
    ],
)
def test_unknown_recipe_is_answered_with_the_nearest(folder, name, words):
    assert words in training(folder, recipe=name)


def test_binary_recipe_file_is_refused(folder):
    (folder / "r.yaml").write_bytes(b"name: \xff")
    assert "r.yaml is not UTF-8 text (byte 6)" in training(folder, recipe="r.yaml")


# At once


@pytest.mark.parametrize(
    "args",
    [
        ["train", "micro", "new", "train.lrr=1"],
        ["train", "micro", "used"],
        ["index", "nowhere"],
        ["resume", "nowhere"],
        ["eval", "used"],
        ["sample-guide", "nowhere", "--at", "1"],
        ["score-checkpoints", "nowhere", "--candidates", "a,b"],
        ["show", "nowhere"],
        ["demo", "--out", "used"],
    ],
)
def test_errors_import_nothing_heavy(folder, args):
    (folder / "used").mkdir()
    (folder / "used" / "file").write_text("something")
    code = (
        "import atexit, sys\n"
        f"heavy = {HEAVY!r}\n"
        "def left():\n"
        "    print([name for name in heavy if name in sys.modules])\n"
        "atexit.register(left)\n"
        "from npo_cli.cli.main import main\n"
        "main()\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 2)
    assert done.stdout == "[]\n"
