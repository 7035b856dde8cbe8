"""`npo autonpo`, from the command line to its two streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npo_cli.storage.autonpo_log import append_transitions
from npo_cli.types.autonpo import AutoNPOState, Transition
from tests.helpers.cli_errors import assert_refused, json_rows, npo
from tests.helpers.recorded_metrics import SENSITIVE_TRIGGER, constant_reward_rows, make_run, write_metrics_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPO_DEBUG", "0")
    return tmp_path


def test_autonpo_explain_prints_transitions_and_reasons_on_stdout(folder):
    write_metrics_file(folder, constant_reward_rows(40))
    result = npo("autonpo", "metrics.jsonl", "--explain", *SENSITIVE_TRIGGER, "autonpo.max_interventions=1")
    assert result.code == 0
    sentence, moves_table, reasons_table, last = result.out.split("\n\n")
    assert sentence == "AutoNPO would have triggered once in 40 recorded steps: at 13"
    moves = [line.split()[:2] for line in moves_table.splitlines()[2:-1]]
    assert moves == [
        *(["0", "started"], ["11", "armed"], ["13", "warning"], ["13", "trigger"], ["13", "probe_accepted"]),
        *(["13", "guide_built"], ["13", "rolled_back"], ["13", "replay_done"], ["18", "armed"], ["20", "warning"]),
        ["20", "limit_reached"],
    ]
    assert [line.rsplit(maxsplit=1) for line in reasons_table.splitlines()[2:6]] == [
        ["autonpo.max_interventions is reached", "21"],
        ["before autonpo.trigger.warmup_steps", "10"],
        ["fewer than autonpo.trigger.patience in a row", "4"],
        ["in a cooldown", "4"],
    ]
    assert last == "next: npo index RUN --import FOLDER --recipe RECIPE\n"
    assert result.err == (
        "read as step: step, reward: reward, entropy: entropy\n"
        "every record is assumed to have a checkpoint (change it with train.save_every=N)\n"
        "plot saved to metrics.jsonl.autonpo.png\n"
        "autonpo.max_interventions=1 would have prevented further triggers from step 20 on\n"
    )


def test_autonpo_explain_json_has_one_object_per_transition(folder):
    write_metrics_file(folder, constant_reward_rows(40))
    result = npo("autonpo", "metrics.jsonl", "--explain", *SENSITIVE_TRIGGER, "autonpo.max_interventions=1", "--json")
    lines = json_rows(result.out)
    assert [(line["step"], line["event"], line["phase_before"], line["phase"]) for line in lines[:5]] == [
        (0, "started", "TRAIN", "TRAIN"),
        (11, "armed", "TRAIN", "TRAIN"),
        (13, "warning", "TRAIN", "TRAIN"),
        (13, "trigger", "TRAIN", "PROBE"),
        (13, "probe_accepted", "PROBE", "GUIDE_GEN"),
    ]
    assert all({"record", "branch", "evidence", "state"} <= set(line) for line in lines)
    assert lines[4]["evidence"] == {"assumed": True, "distance": 10}
    assert len(lines) == 11
    assert os.listdir(folder) == ["metrics.jsonl"]
    npo("autonpo", "metrics.jsonl", "--explain", "--json", "--figure", "here.svg")
    assert sorted(os.listdir(folder)) == ["here.svg", "metrics.jsonl"]


def test_autonpo_explain_takes_columns_and_settings(folder):
    write_metrics_file(
        folder, [{"i": row["step"], "acc": row["reward"], "H": row["entropy"]} for row in constant_reward_rows(40)]
    )
    named = ("--step", "i", "--reward", "acc", "--entropy", "H")
    result = npo(
        "autonpo", "metrics.jsonl", "--explain", *named, *SENSITIVE_TRIGGER, "autonpo.trigger.patience=1", "--json"
    )
    triggers = [row["step"] for row in json_rows(result.out) if row["event"] == "trigger"]
    assert triggers == [11, 16]


def test_autonpo_explains_and_shows_a_run(folder):
    run = make_run(folder, constant_reward_rows(40))
    assert "W 20, patience 5, c_r 1" in npo("autonpo", "run", "--explain", "--full").out
    assert (run.root / "autonpo.png").exists()
    state = AutoNPOState(branch="main", step=5)
    append_transitions(run, [Transition(step=5, event="armed", phase_before="TRAIN", state=state)])
    result = npo("autonpo", "run")
    assert result.code == 0
    assert result.out.startswith(
        "AutoNPO on main, TRAIN at step 5: 0 rollbacks, 0 rejected\n\n"
        "What AutoNPO did\nstep  event  based on\n   5  armed  end of the warm-up\n\nEverything executed\n"
    )
    assert result.out.endswith(f"\nnext: npo resume {run.root.name} --autonpo\n")
    full = npo("autonpo", "run", "--full").out
    assert "\nstep  event  branch  based on\n   5  armed  main    end of the warm-up\n\nCosts\n" in full
    move, cost = json_rows(npo("autonpo", "run", "--json").out)
    assert (move["step"], move["event"], move["branch"], move["phase"]) == (5, "armed", "main", "TRAIN")
    assert cost["record"] == "run_costs"


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["nope"], "there is no run directory or file nope", "name a run directory, or"),
        (["run"], "run was never trained with AutoNPO", "npo resume run --autonpo"),
        (["m.jsonl"], "m.jsonl is not a run directory, which is needed", "npo autonpo m.jsonl --explain"),
        (["run", "--reward", "acc"], "--reward needs --explain", "npo autonpo run --explain"),
        (["run", "autonpo.trigger.window=3"], "KEY=VALUE needs --explain", "npo autonpo run --explain"),
        (
            ["m.jsonl", "--explain", "--branch", "b"],
            "--branch needs a run directory",
            "npo autonpo m.jsonl --explain",
        ),
        (["run", "--explain", "--branch", "b"], "run has no branch 'b': main", "npo show run lineage"),
        (["m.jsonl", "--explain", "--figure", "x.txt"], "--figure x.txt must end in .png", "--figure x.txt.png"),
        (
            ["m.jsonl", "--explain", "--figure", "run/m.svg"],
            "--figure run/m.svg is a folder",
            "--figure run/m.svg/figure",
        ),
        (["m.jsonl", "--explain", "--reward", "x"], "m.jsonl has no number in a column 'x'", "--reward COLUMN"),
        (
            ["m.jsonl", "--explain", "auto.wndow=3"],
            "auto.wndow is not a setting",
            "write autonpo.trigger.window instead",
        ),
        (
            ["m.jsonl", "--explain", "autonpo.rollback.distances=[20,10]"],
            "autonpo.rollback.distances must be ascending",
            "npo config",
        ),
        (
            ["bin", "--explain"],
            "bin is not UTF-8 text (byte 0)",
            "name a run directory, or",
        ),
        (["empty", "--explain"], "empty is empty", "it needs one record per line"),
        (["plain", "--explain"], "plain has no metrics that can be read", "name a run directory"),
    ],
)
def test_autonpo_refuses_bad_input(folder, args, message, hint):
    make_run(folder, constant_reward_rows(40))
    write_metrics_file(folder, constant_reward_rows(3), "m.jsonl")
    (folder / "bin").write_bytes(b"\xff\xfe")
    (folder / "empty").write_text("")
    (folder / "plain").mkdir()
    (folder / "run" / "m.svg").mkdir()
    result = assert_refused("autonpo", *args, beside=folder)
    assert result.message.startswith(message)
    assert hint in result.hint


def test_autonpo_imports_nothing_heavy_for_errors_and_json(folder):
    write_metrics_file(folder, constant_reward_rows(40))
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'matplotlib', 'scipy')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "from npo_cli.cli.main import main\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for args in (["nope", "--explain"], ["metrics.jsonl", "--explain", "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "autonpo", *args], capture_output=True, text=True, env=environment
        )
        assert done.stdout.splitlines()[-1] == "[]"
