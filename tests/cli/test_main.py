import io
import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from npo_cli.cli import main as cli
from npo_cli.cli.checks import parse_steps
from npo_cli.cli.commands import COMMAND_WIDTH, GROUPS, load_command
from npo_cli.cli.train import choose_run_directory, split_arguments
from npo_cli.config.loading import load_recipe, recipe_to_dict
from npo_cli.config.locate import list_recipe_names
from npo_cli.errors import NpoError, RunFailed, StoppedEarly
from tests.helpers.cli_errors import json_rows

runner = CliRunner()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_shows_its_purpose_and_an_example(command):
    result = runner.invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert load_command(command).help.splitlines()[0] == cli.COMMANDS[command].summary
    assert cli.COMMANDS[command].summary in result.output
    assert f"Example: {cli.COMMANDS[command].example}" in " ".join(result.output.split())
    assert all(len(line) <= 80 for line in result.output.splitlines())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_example_parses(command):
    program, name, *args = shlex.split(cli.COMMANDS[command].example)
    assert (program, name) == ("npo", command)
    cli.typer.main.get_command(cli.app).commands[command].make_context(command, args)


def test_help_lists_every_command_in_its_group():
    output = runner.invoke(cli.app, ["--help"]).output
    sections = dict(part.split(":\n", 1) for part in output.split("\n\n") if ":\n" in part)
    assert list(sections)[-len(GROUPS) :] == list(GROUPS)
    for name, command in cli.COMMANDS.items():
        first_words = " ".join(command.summary.split()[:4])
        assert f"{name.ljust(COMMAND_WIDTH)}  {first_words}" in sections[command.group]
    assert all(len(line) <= 80 for line in output.splitlines())


def test_options_are_no_abbreviations_of_torchrun_options():
    launch = pytest.importorskip("torch.distributed.run").get_args_parser()
    theirs = [text for action in launch._actions for text in action.option_strings if text.startswith("--")]
    commands = cli.typer.main.get_command(cli.app).commands
    ours = {(name, text) for name, each in commands.items() for option in each.params for text in option.opts}
    clashes = {(name, text) for name, text in ours for other in theirs if text[:2] == "--" and other.startswith(text)}
    # `--run` is the alias for one process; under torchrun the run directory is positional
    assert clashes == {("train", "--run")}


def test_recipes_lists_every_shipped_recipe():
    result = runner.invoke(cli.app, ["recipes", "--json"])
    lines = json_rows(result.stdout)
    assert [line["name"] for line in lines] == list(list_recipe_names())
    assert all(line["description"] and line["path"].endswith(".yaml") for line in lines)


def test_recipes_prints_yaml_that_loads_to_the_same_recipe(tmp_path):
    result = runner.invoke(cli.app, ["recipes", "micro"])
    (tmp_path / "copy.yaml").write_text(result.stdout, encoding="utf-8")
    assert load_recipe(str(tmp_path / "copy.yaml")) == load_recipe("micro")


def test_recipes_prints_json():
    result = runner.invoke(cli.app, ["recipes", "micro", "--json"])
    assert json.loads(result.stdout) == recipe_to_dict(load_recipe("micro"))


def test_candidates_are_comma_separated_steps():
    assert parse_steps("20, 40,60") == (20, 40, 60)
    for wrong in ("", "20,", "a", "-20", "2.5", "²"):
        with pytest.raises(NpoError, match="--candidates takes comma-separated steps"):
            parse_steps(wrong)


# npo train RECIPE [RUN] [KEY=VALUE ...]


def test_run_directory_is_the_argument_without_equals_sign():
    assert split_arguments(["runs/a", "x=1"], run=None) == (Path("runs/a"), ["x=1"])
    assert split_arguments(["x=1"], run=None) == (None, ["x=1"])
    assert split_arguments(["runs/lr=1/a", "x=1"], run=None) == (Path("runs/lr=1/a"), ["x=1"])
    assert split_arguments(["x=1"], run=Path("a")) == (Path("a"), ["x=1"])
    assert split_arguments([], run=None) == (None, [])
    with pytest.raises(NpoError, match="given twice: a and --run b"):
        split_arguments(["a"], run=Path("b"))


def test_default_run_directory_is_the_first_free_number(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert choose_run_directory("micro") == Path("runs/micro-1")
    (tmp_path / "runs" / "micro-1").mkdir(parents=True)
    (tmp_path / "runs" / "micro-2").write_text("")
    assert choose_run_directory("micro") == Path("runs/micro-3")
    assert choose_run_directory("../recipes/mine.yaml") == Path("runs/mine-1")


# npo docs


def test_docs_lists_pages_and_prints_one(capsys):
    assert left_with(["docs"]) == 0
    assert "reference/run-directory" in capsys.readouterr().out
    assert left_with(["docs", "run-directory"]) == 0
    assert capsys.readouterr().out.startswith("# ")


def test_docs_answers_an_unknown_page_with_the_nearest(capsys):
    assert left_with(["docs", "run-directry"]) == 2
    assert capsys.readouterr().err.endswith("try: npo docs reference/run-directory\n")


# main(): errors become two lines and an exit code


def left_with(args: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    return caught.value.code


def raising(monkeypatch, error: BaseException) -> None:
    """Give the app a door that fails in a chosen way; the rest of it is as shipped."""
    app = cli.typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)


@pytest.mark.parametrize(
    ("error", "code", "label"),
    [
        (NpoError("wrong", "mend"), 2, "error: "),
        (RunFailed("wrong", "mend"), 1, "error: "),
        (StoppedEarly("wrong", "mend"), 130, ""),
    ],
)
def test_error_is_two_lines_with_its_exit_code(monkeypatch, capsys, error, code, label):
    raising(monkeypatch, error)
    assert left_with([]) == code
    assert capsys.readouterr() == ("", f"{label}wrong\n  try: mend\n")


def test_error_message_is_one_line_without_control_characters(monkeypatch, capsys):
    raising(monkeypatch, NpoError("a\nb\x1b[2J", ""))
    left_with([])
    assert capsys.readouterr().err == "error: a b\\x1b[2J\n"


def test_unexpected_exception_is_one_line_with_a_hint(monkeypatch, capsys):
    raising(monkeypatch, KeyError("oops"))
    assert left_with([]) == 1
    assert capsys.readouterr().err == (
        "error: KeyError: 'oops'\n  try: NPO_DEBUG=1 shows where it happened; please report it\n"
    )


def test_npo_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("NPO_DEBUG", "1")
    raising(monkeypatch, NpoError("wrong", "mend"))
    assert left_with([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith("error: wrong\n  try: mend\n")


def test_narrow_encoding_gets_escapes(monkeypatch):
    app = cli.typer.Typer(rich_markup_mode=None)
    app.command()(lambda: cli.print_data("é 文"))
    monkeypatch.setattr(cli, "app", app)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    assert left_with([]) == 0
    assert narrow.buffer.getvalue() == b"\\xe9 \\u6587\n"


def test_ctrl_c_exits_with_130(monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    assert left_with([]) == 130


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train"], "Missing argument 'RECIPE'"),
        (["bogus"], "No such command 'bogus'"),
        (["resume", "x", "--at", "-1"], "Invalid value for '--at'"),
        (["show", "x", "everything"], "'everything' is not one of"),
        (["index", "x", "--colour"], "No such option"),
    ],
)
def test_usage_errors_exit_with_2(capsys, args, words):
    assert left_with(args) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "micro", "new", "train.lrr=1"], "train.lrr is not a setting"),
        (["train", "micro", "new", "lr"], "'lr' is not a setting: write KEY=VALUE"),
        (["train", "nope", "new"], "there is no shipped recipe named 'nope'"),
        (["resume", "new"], "there is no run directory new"),
        (["index", "new"], "there is no run directory new"),
        (["score-checkpoints", "new", "--candidates", "x"], "--candidates takes comma-separated steps"),
        (["sample-guide", "new"], "there is no run directory new"),
        (["eval", "new", "--all", "--step", "3"], "--step and --all cannot be combined"),
        (["show", "new"], "there is no run directory new"),
        (["recipes", "nope"], "there is no shipped recipe named 'nope'"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert left_with(args) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert first.startswith(f"error: {message}")
    assert second.startswith("  try: ")
    assert out == ""
    assert list(tmp_path.iterdir()) == []
