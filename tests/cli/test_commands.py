"""Doors that open a run, on one tiny run made by `npo train` itself."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from npo_cli.cli.main import app
from tests.helpers.cli_errors import json_rows

SMALL = [
    *("train.num_steps=4", "train.save_every=2", "train.prompts_per_step=4", "train.group_size=4"),
    *("task.pool_size=16", "task.heldout_size=8", "eval.every=0", "model.threads=1"),
]
runner = CliRunner()


def called(*args: str) -> Result:
    return runner.invoke(app, list(args), catch_exceptions=False)


def lines_of(result: Result) -> list[dict]:
    assert result.exit_code == 0
    return json_rows(result.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doors") / "run"
    lines = lines_of(called("train", "micro", str(root), *SMALL, "--json"))
    steps = [line["step"] for line in lines if line["record"] == "step_report"]
    assert steps == [1, 2, 3, 4]
    return root


def test_index_lists_checkpoints(run):
    lines = lines_of(called("index", str(run), "--json"))
    assert [(line["branch"], line["step"], line["complete"]) for line in lines] == [
        ("main", 0, True),
        ("main", 2, True),
        ("main", 4, True),
    ]
    sentence, table, last = called("index", str(run)).stdout.split("\n\n")
    assert sentence == "3 checkpoints on 1 branch, none evaluated"
    assert last == f"next: npo eval {run} --all\n"
    title, header, *rows = [line.split() for line in table.splitlines()]
    assert (title, header[:3], rows[2][:3]) == (["Checkpoints"], ["branch", "step", "tier"], ["main", "4", "full"])
    _, header, *rows = called("index", str(run), "--full").stdout.split("\n\n")[1].splitlines()
    assert header.split()[:4] == ["branch", "step", "parent", "tier"]
    assert rows[2].split()[:3] == ["main", "4", "main:2"]


def test_show_metrics_lists_every_step(run):
    lines = lines_of(called("show", str(run), "metrics", "--json"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"reward", "entropy", "seconds"} <= set(line) for line in lines)
    only = lines_of(called("show", str(run), "metrics", "--step", "3", "--json"))
    assert only == [lines[2]]


def test_show_groups_of_the_newest_step(run):
    lines = lines_of(called("show", str(run), "groups", "--json"))
    # 4 prompts a step, 4 rollouts each
    assert [line["step"] for line in lines] == [4] * 4
    assert [len(line["group"]["rollouts"]) for line in lines] == [4] * 4


def test_show_rollouts_of_one_prompt(run):
    newest = lines_of(called("show", str(run), "rollouts", "--json"))
    assert len(newest) == 16
    prompt = newest[0]["rollout"]["prompt_id"]
    story, visit = lines_of(called("show", str(run), "rollouts", "--prompt", prompt, "--limit", "1", "--json"))
    assert (story["record"], story["prompt_id"]) == ("prompt_history", prompt)
    assert (visit["record"], visit["step"]) == ("prompt_visit", 4)
    # every token and log-probability of the visit, as without --prompt
    assert visit["group"]["rollouts"] == [line["rollout"] for line in newest if line["rollout"]["prompt_id"] == prompt]
    history = called("show", str(run), "rollouts", "--prompt", prompt, "--full").stdout
    assert history.startswith(f"prompt {prompt} on main: ")
    assert f"\n\nPrompt {prompt} in the lineage of main: " in history
    assert f"Step 4, main: {visit['num_correct']} of 4 on-policy rollouts correct\n" in history


def test_report_writes_a_page_and_figures(run, tmp_path):
    out, folder = tmp_path / "r.html", tmp_path / "pictures"
    result = called("report", str(run), "--out", str(out), "--figures", str(folder))
    assert result.exit_code == 0
    assert " ".join(result.stdout.split()).startswith(f"{out} shows {run}: main is trained to step 4")
    assert result.stdout.endswith(f"\nnext: npo export {run} --step 4 --out step-4\n")
    *_, page, pictures = result.stderr.splitlines()
    assert page.startswith(f"report: {out}, ")
    # reward, entropy and the lineage; nothing was evaluated
    assert pictures == f"figures: 3 as PNG and SVG in {folder}"
    assert len(list(folder.iterdir())) == 6


def test_show_lineage(run):
    (line,) = lines_of(called("show", str(run), "lineage", "--json"))
    assert (line["branch"], line["parent"], line["fork_step"], line["guide_cache"]) == ("main", None, 0, None)


def test_show_guides_of_a_run_without_guides(run):
    result = called("show", str(run), "guides", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"{run} has no guides yet\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "guides", "--step", "1"], "--step does not apply to guides"),
        (["show", "metrics", "--prompt", "p"], "--prompt does not apply to metrics"),
        (["show", "metrics", "--branch", "nope"], "has no branch 'nope': main"),
        (["show", "rollouts", "--step", "99"], "has no rollouts of step 99"),
        (["resume", "loss.kind=gspo"], "loss.kind cannot change from grpo to gspo"),
        (
            ["resume", "guide.inject.max_accuracy=0.1"],
            "guide.inject.max_accuracy cannot change from 0.6 to 0.1 within a branch",
        ),
        (["score-checkpoints", "score.kk=1"], "score.kk is not a setting"),
        (["eval", "--branch", "nope"], "has no branch 'nope': main"),
        (["index", "--branch", "nope"], "has no branch 'nope'; it has: main"),
        (["report", "--branch", "nope"], "has no branch 'nope'; it has: main"),
        (["resume", "--branch", "nope"], "has no branch 'nope': main"),
    ],
)
def test_commands_refuse_what_a_run_lacks(run, args, message):
    command, *rest = args
    result = runner.invoke(app, [command, str(run), *rest])
    assert message in result.exception.message
    assert result.exception.hint
    assert result.exception.exit_code == 2


def test_eval_prints_one_report_per_checkpoint(run):
    lines = lines_of(called("eval", str(run), "--all", "eval.samples_per_prompt=1", "--json"))
    assert [(line["record"], line["step"], line["num_prompts"]) for line in lines] == [
        ("eval_report", 0, 8),
        ("eval_report", 2, 8),
        ("eval_report", 4, 8),
    ]


def test_workflow_in_six_commands(tmp_path):
    """train, index, score-checkpoints, sample-guide, resume with a guide, resume with AutoNPO."""
    root = str(tmp_path / "R")
    trigger = ["autonpo.trigger.window=3", "autonpo.trigger.patience=3", "autonpo.trigger.warmup_steps=0"]
    tiny = [
        *SMALL,
        *trigger,
        "autonpo.rollback.distances=[2,4]",
        "autonpo.max_interventions=0",
        "autonpo.probe.num_prompts=8",
        "autonpo.rollback.min_failed_prompts=4",
    ]
    few = ["scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50"]
    lines_of(called("train", "micro", root, *tiny, "train.num_steps=6", "--json"))
    assert [line["step"] for line in lines_of(called("index", root, "--json"))] == [0, 2, 4, 6]
    *scores, choice = lines_of(called("score-checkpoints", root, "--at", "2", "--candidates", "4,6", *few, "--json"))
    assert [(line["candidate"], line["distance"]) for line in scores] == [
        ("checkpoint:4", 2),
        ("checkpoint:6", 4),
        ("none", 0),
    ]
    assert choice["record"] == "guide_choice"
    assert all({"quality", "variance", "signal"} <= set(line) for line in scores)
    (guide,) = lines_of(called("sample-guide", root, "--at", "2", "--source", "6", "--name", "late", "--json"))
    assert (guide["name"], guide["learner_step"], guide["complete"]) == ("late", 2, True)
    fork = lines_of(called("resume", root, "--at", "2", "--guide", "late", "--new-branch", "late", "--json"))
    assert ({line["branch"] for line in fork}, fork[-1]["step"]) == ({"late"}, 6)
    lineage = lines_of(called("show", root, "lineage", "--json"))
    assert [(line["branch"], line["parent"], line["guide_cache"]) for line in lineage] == [
        ("main", None, None),
        ("late", "main", "late"),
    ]
    watched = lines_of(called("resume", root, "--autonpo", "train.num_steps=8", "--json"))
    assert [line["step"] for line in watched if line["record"] == "step_report"][-2:] == [7, 8]
    (only,) = {line["branch"] for line in lines_of(called("index", root, "--branch", "late", "--json"))}
    assert only == "late"
