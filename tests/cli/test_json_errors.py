"""With --json an error is one JSON line on stdout, and stderr is empty; every command takes the option."""

import json

import pytest

from npo_cli.cli import main as cli
from tests.helpers.cli_errors import npo


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_prints_usage_errors_as_json(command):
    options = [text for each in cli.typer.main.get_command(cli.app).commands[command].params for text in each.opts]
    assert "--json" in options
    result = npo(command, "--no-such-option", "--json")
    assert (result.code, result.err) == (2, "")
    error = json.loads(result.out)
    assert "--no-such-option" in error["error"]
    assert error == {"record": "error", "error": error["error"], "hint": f"npo {command} --help", "exit_code": 2}


def test_error_of_bad_input_is_one_json_line(tmp_path):
    result = npo("train", "micro", tmp_path / "r", "train.lrr=1", "--json")
    assert (result.code, result.err) == (2, "")
    error = json.loads(result.out)
    assert error["error"] == "train.lrr is not a setting (command line)"
    assert (error["hint"], error["exit_code"]) == ("write train.lr instead of train.lrr", 2)


def test_error_of_a_failure_has_its_exit_code(monkeypatch):
    def fail(*, full):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("npo_cli.preflight.environment.run_checks", fail)
    result = npo("doctor", "--json")
    error = json.loads(result.out)
    assert (result.code, error["exit_code"], error["error"]) == (1, 1, "RuntimeError: two\nlines")


def test_unknown_command_is_json_too():
    assert json.loads(npo("trian", "--json").out)["exit_code"] == 2
