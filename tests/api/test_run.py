"""`npo.Run`, `npo.score`, `npo.sample_guide`, `npo.evaluate` and `npo.compare`: tables equal what `--json` prints."""

import json
import sys
from pathlib import Path

import pandas
import pytest

import npo_cli as npo
from npo_cli.storage.autonpo_log import append_transitions
from npo_cli.storage.costs import append_cost
from npo_cli.storage.layout import open_run
from npo_cli.types.autonpo import AutoNPOState, Transition
from tests.helpers.cli_errors import npo as npo_command
from tests.helpers.runs import copy_run

FEW = {"scoring.num_prompts": 8, "scoring.samples_per_prompt": 2, "scoring.bootstrap_resamples": 50}


def printed(*args: object, record: str) -> list[dict]:
    """Rows of one kind that a command prints with `--json`."""
    lines = map(json.loads, npo_command(*args, "--json").out.splitlines())
    return [row for row in lines if row.pop("record") == record]


@pytest.mark.parametrize(
    ("table", "args", "record"),
    [
        ("metrics", ("show", "metrics"), "step_report"),
        ("guides", ("show", "guides"), "guide_cache_info"),
        ("checkpoints", ("index",), "checkpoint_entry"),
        ("learning_curve", ("show", "costs", "--branch", "main"), "curve_point"),
    ],
)
def test_a_table_has_the_rows_and_keys_of_json(circle: Path, table, args, record):
    command, *rest = args
    rows = getattr(npo.Run(circle), table)(as_list=True)
    assert rows == printed(command, circle, *rest, record=record)
    assert rows


def test_tables_are_data_frames_where_pandas_is_installed(circle: Path):
    run = npo.Run(circle)
    metrics = run.metrics()
    assert isinstance(metrics, pandas.DataFrame)
    assert list(metrics.columns[:2]) == ["branch", "step"]
    assert metrics.groupby("branch")["tokens"].count().to_dict() == {"again": 4, "main": 4}
    assert list(run.metrics("main").step) == [1, 2, 3, 4]
    assert list(run.evals().accuracy) == [row["accuracy"] for row in run.evals(as_list=True)]
    assert list(run.scores().learner_step) == [0, 0, 0]
    assert list(run.scores().candidate) == ["checkpoint:2", "checkpoint:4", "none"]


def test_tables_are_lists_without_pandas(circle: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert npo.Run(circle).evals() == npo.Run(circle).evals(as_list=True)


def test_an_empty_table_has_its_columns(circle: Path):
    empty = npo.Run(circle).transitions()
    assert (len(empty), list(empty.columns[:3])) == (0, ["step", "branch", "phase"])
    assert list(npo.Run(circle).evals("again").columns[:3]) == ["branch", "step", "num_prompts"]


def test_costs_count_a_piece_that_was_executed_again_once(tmp_path, circle: Path):
    root = copy_run(circle, tmp_path / "run")
    before = npo.Run(root).costs("main", as_list=True)
    [first] = [row for row in before if row["kind"] == "train" and row["step"] == 3]
    append_cost(open_run(root), "train", branch="main", step=3, seconds=2.0, tokens=first["tokens"], updates=1)
    after = npo.Run(root).costs("main", as_list=True)
    [again] = [row for row in after if row["kind"] == "train" and row["step"] == 3]
    assert len(after) == len(before)
    assert again == first | {"seconds": first["seconds"] + 2.0}


def test_a_run_gives_its_branches_recipe_and_checkpoints(circle: Path):
    run = npo.Run(str(circle))
    assert run.branches == ("main", "again")
    assert run.recipe().train.num_steps == 4
    assert (run.checkpoint(4) / "model.safetensors").exists()
    assert run == npo.Run(circle)
    with pytest.raises(npo.NpoError, match="has no branch 'other'"):
        run.evals("other")


def test_transitions_are_autonpos_log(tmp_path, circle: Path):
    root = copy_run(circle, tmp_path / "run")
    state = AutoNPOState(branch="again", step=4, phase="COOLDOWN")
    armed = Transition(step=4, event="armed", phase_before="TRAIN", state=state, evidence={"reward_gain": None})
    append_transitions(open_run(root), [armed])
    [row] = npo.Run(root).transitions("again", as_list=True)
    assert (row["step"], row["branch"], row["phase"], row["event"]) == (4, "again", "COOLDOWN", "armed")
    assert npo.Run(root).transitions("main", as_list=True) == []


def test_score_sample_evaluate_and_compare_return_records(circle: Path, tmp_path):
    run = npo.Run(copy_run(circle, tmp_path / "run"))
    result = npo.score(run, at=0, candidates=[4, "self"], overrides=FEW)
    assert [one.candidate for one in result.scores] == ["self", "checkpoint:4", "none"]
    assert result.chosen == result.choice.chosen
    assert list(result.table().candidate) == ["self", "checkpoint:4", "none"]

    guide = npo.sample_guide(run, at=0, source=4, name="second", overrides={"guide.cache.prompts": "all"})
    assert (guide.name, guide.learner_step, guide.guide_step, guide.complete) == ("second", 0, 4, True)

    [report] = npo.evaluate(run, step=2, branch="main")
    assert (report.branch, report.step) == ("main", 2)
    assert npo.evaluate(run, every_step=True, branch="main")[1] == report

    comparison = npo.compare({"GRPO": f"{run.path}:main", "NPO": f"{run.path}:again"}, thresholds=[0.1])
    assert [summary.method for summary in comparison.methods] == ["GRPO", "NPO"]
    assert [difference.method for difference in comparison.differences] == ["NPO"]
    assert set(comparison.points().method) == {"GRPO", "NPO"}
    with pytest.raises(npo.NpoError, match="must be above 0 and at most 1"):
        npo.compare([run], thresholds=[2])
