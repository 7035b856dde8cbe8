"""Run directories, steps, branches, guides and settings that a command cannot serve: nothing in the run changes."""

import shlex
import shutil
from pathlib import Path

import pytest

from npo_cli.storage.checkpoints import demote_checkpoint, find_checkpoint
from npo_cli.storage.layout import FORMAT_VERSION, RunDir
from tests.helpers.cli_errors import SMALL, assert_refused, copy_run, json_rows, npo, set_fields


def words(circle: Path, *args: str) -> str:
    """What a command on the run answers; the run's path is written RUN, as it is typed where it stands in a hint."""
    command, *rest = args
    result = assert_refused(command, circle, *rest, beside=circle.parent)
    return f"{result.message.replace(str(circle), 'RUN')} | {result.hint.replace(shlex.quote(str(circle)), 'RUN')}"


# Run directories


def test_train_refuses_an_existing_run(circle):
    result = assert_refused("train", "micro", circle, beside=circle.parent)
    assert result.message == f"{circle} already holds a run"
    assert result.hint == f"resume it: npo resume {shlex.quote(str(circle))}, or choose a new folder for RUN"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("recipe.yaml", "is a file, not a folder"),
        ("guides", "is not empty and holds no run"),
        ("recipe.yaml/x", "recipe.yaml is a file"),
    ],
)
def test_train_refuses_a_path_that_cannot_become_a_run(circle, path, message):
    assert assert_refused("train", "micro", circle / path, beside=circle.parent).message.endswith(message)


@pytest.mark.parametrize("command", ["index", "show", "eval", "resume", "sample-guide", "score-checkpoints"])
def test_every_command_refuses_a_folder_without_a_run(circle, tmp_path, command):
    for path, message in (
        (tmp_path / "nowhere", f"there is no run directory {tmp_path / 'nowhere'}"),
        (circle / "guides", f"{circle / 'guides'} is not a run directory: it has no npo_run.json"),
        (circle / "recipe.yaml", f"{circle / 'recipe.yaml'} is not a run directory: it has no npo_run.json"),
    ):
        result = assert_refused(command, path, beside=circle.parent)
        assert result.message == message
        assert "npo train RECIPE" in result.hint


def test_every_command_refuses_a_newer_run_format(circle, tmp_path):
    run = copy_run(circle, tmp_path)
    set_fields(run / "npo_run.json", format=99, npo_version="9.9")
    for args in (["index"], ["show"], ["eval"], ["resume"], ["sample-guide", "--at", "0"], ["score-checkpoints"]):
        result = assert_refused(args[0], run, *args[1:], beside=tmp_path)
        assert (
            result.message
            == f"{run} was written by npo 9.9 in run format 99; this npo reads formats up to {FORMAT_VERSION}"
        )


# Steps and branches


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "--step", "3"],
        ["score-checkpoints", "--at", "3"],
        ["sample-guide", "--at", "3", "--source", "4"],
        ["sample-guide", "--at", "0", "--source", "3"],
        ["score-checkpoints", "--at", "0", "--candidates", "2,3"],
        ["resume", "--at", "3", "--no-guide"],
    ],
)
def test_missing_checkpoint_error_lists_the_checkpoints(circle, args):
    assert words(circle, *args) == (
        "RUN has no complete checkpoint of step 3 on branch main; it has steps: 0, 2, 4 "
        "| choose one of these, or see npo index RUN"
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["eval", "--branch", "nope"], "RUN has no branch 'nope': main, again | npo show RUN lineage"),
        (["eval", "--branch", ""], "RUN has no branch '': main, again | npo show RUN lineage"),
        (["show", "--branch", "../main"], "RUN has no branch '../main': main, again | npo show RUN lineage"),
        (["resume", "--branch", "nope"], "RUN has no branch 'nope': main, again | npo show RUN lineage"),
        (["show", "metrics", "--step", "99"], "RUN has no metrics of step 99 | npo show RUN metrics"),
        (
            ["show", "groups", "--prompt", "p q", "--step", "1"],
            "RUN has no groups of step 1 and prompt 'p q' | npo show RUN groups",
        ),
        (
            ["show", "metrics", "--prompt", "p q"],
            "--prompt does not apply to metrics | npo show RUN rollouts --prompt 'p q'",
        ),
        (["show", "costs", "--step", "1"], "--step does not apply to costs | npo show RUN costs"),
        (["eval", "--all", "--step", "2"], "--step and --all cannot be combined | give one of them, or neither for"),
    ],
)
def test_unknown_branch_step_or_guide_is_refused(circle, args, expected):
    assert words(circle, *args).startswith(expected)


@pytest.mark.parametrize("text", ["a,b", "", " ", "2,,4", "-2", "2 4", "2;4", "2.0", "9" * 5000])
def test_candidates_that_are_not_steps_are_refused(circle, text):
    result = words(circle, "score-checkpoints", "--at", "0", "--candidates", text)
    assert result.startswith("--candidates takes comma-separated steps, got ")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["score-checkpoints"],
            "the learner's step is missing: the recipe has no guide.replay.at_step | add --at STEP",
        ),
        (
            ["sample-guide", "--at", "2"],
            "no guide was given: the recipe has no guide.replay.guide_step | add --source STEP",
        ),
        (["score-checkpoints", "--at", "2", "--candidates", "2"], "step 2 is not later than the learner's step 2"),
        (["score-checkpoints", "--at", "2", "--candidates", "4,0"], "step 0 is not later than the learner's step 2"),
        (
            ["score-checkpoints", "--at", "0", "scoring.budget=1"],
            "scoring.budget is 1, but 2 candidates in 1 rounds need at",
        ),
        (["sample-guide", "--at", "2", "--source", "2"], "step 2 is not later than the learner's step 2"),
        (["sample-guide", "--at", "4", "--source", "2"], "step 2 is not later than the learner's step 4"),
        (
            ["score-checkpoints", "--at", "4", "--branch", "main"],
            "main has no checkpoint later than step 4 | train further: npo resume RUN --branch main train.num_steps=8",
        ),
    ],
)
def test_learner_without_later_checkpoints_is_refused(circle, args, expected):
    assert words(circle, *args).startswith(expected)


def test_scoring_without_failed_prompts_is_refused(circle, tmp_path):
    run = copy_run(circle, tmp_path)  # the costs of what was sampled are written
    before = sorted((run / "scores").iterdir())
    # with the gate at 0 and one sample, only a prompt that is solved is above it: ask until one is
    args = (
        "--branch",
        "main",
        "--at",
        "0",
        "scoring.num_prompts=1",
        "scoring.samples_per_prompt=1",
        "guide.inject.max_accuracy=0",
    )
    result = npo("score-checkpoints", run, *args)
    if result.code == 0:
        pytest.skip("the learner failed the one prompt it was asked")
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith("the learner at step 0 solves all 1 prompts above guide.inject.max_accuracy=0.0")
    assert sorted((run / "scores").iterdir()) == before


# Settings of a run that exists


@pytest.mark.parametrize("command", ["resume", "eval", "score-checkpoints", "sample-guide"])
@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("train.weight_decay=1e-3", "train.weight_decay cannot change from 0.0 to 0.001"),
        ("task.kind=addh2", "task.kind cannot change from mix3 to addh2"),
        ("train.group_size=8", "train.group_size cannot change from 4 to 8"),
        ("task.heldout_size=2", "task.heldout_size cannot change from 4 to 2"),
        ("train.betas=[0.8, 0.9]", "train.betas cannot change from (0.9, 0.95) to (0.8, 0.9)"),
    ],
)
def test_frozen_setting_is_refused_by_every_command(circle, command, override, change):
    typed = shlex.quote(override.replace("1e-3", "0.001"))
    recipe = circle / "branches" / "main" / "recipe.yaml"
    result = assert_refused(command, circle, override, beside=circle.parent)
    assert result.message == f"{change}: completed steps depend on it"
    assert result.hint == f"npo train {shlex.quote(str(recipe))} NEW_RUN {typed}"


def test_frozen_setting_hint_is_a_command_that_works(circle, tmp_path):
    hint = assert_refused("resume", circle, "loss.clip_low=0.1", beside=circle.parent).hint
    args = shlex.split(hint.replace("NEW_RUN", shlex.quote(str(tmp_path / "new run"))))
    assert npo(*args[1:]).code == 0
    assert "clip_low: 0.1" in (tmp_path / "new run" / "recipe.yaml").read_text()


@pytest.mark.parametrize("command", ["eval", "score-checkpoints", "sample-guide"])
def test_learning_rate_is_refused_by_commands_that_train_nothing(circle, command):
    result = assert_refused(command, circle, "train.lr=1e-3", beside=circle.parent)
    assert result.message == "train.lr cannot change from 0.0003 to 0.001: this command trains nothing"


def test_guide_setting_changes_only_when_forking(circle):
    assert words(circle, "resume", "guide.inject.max_accuracy=0.1") == (
        "guide.inject.max_accuracy cannot change from 0.6 to 0.1 within a branch, only when forking "
        "| fork a new branch: add --at STEP and --guide NAME or --no-guide to the command"
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "the run has completed step 4 of 4 | npo resume RUN train.num_steps=8"),
        (["train.num_steps=2"], "the run has completed step 4 of 2 | npo resume RUN train.num_st"),
        (["--branch", "main"], "the run has completed step 4 of 4 | npo resume RUN --branch main train"),
        (["--at", "4", "--no-guide"], "the run has completed step 4 of 4 | npo resume RUN --at 4 --no-guide "),
        (["--at", "0"], "--at 0 forks a new branch: say whether it has a guide. --guide NAME injects the responses of"),
        (["--no-guide"], "--no-guide forks a branch without a guide cache, but --at STEP is missing"),
        (["--at", "0", "--no-guide", "--guide", "near"], "--no-guide forks a branch without a guide cache, but --gui"),
        (["--at", "0", "--no-guide", "--autonpo"], "--no-guide forks a branch without a guide cache, but --autonpo i"),
        (
            ["--at", "0", "--no-guide", "guide.source=extrapolated"],
            "--no-guide, but guide.source=extrapolated samples a guide during training",
        ),
        (["--at", "4", "--branch", "b"], "RUN has no branch 'b': main, again | --new-branch b "),
        (["--guide", "near"], "--guide needs --at STEP | npo resume RUN --guide near --at"),
        (["--new-branch", "x"], "--new-branch needs --at STEP | npo resume RUN --new-branch x --at STEP"),
        (["--steps", "2"], "--steps needs --at STEP"),
        (["--at", "0", "--no-guide", "--steps", "2"], "--steps needs --guide NAME"),
    ],
)  # fmt: skip
def test_resume_with_nothing_to_do_or_missing_options_is_refused(circle, args, expected):
    assert words(circle, "resume", *args).startswith(expected)


def test_num_steps_is_frozen_with_a_decaying_learning_rate(tmp_path):
    run = tmp_path / "run"
    assert npo("train", "micro", run, *SMALL, "train.schedule=linear").code == 0
    result = assert_refused("resume", run, "train.num_steps=8", beside=tmp_path)
    assert "the linear schedule of the completed steps was computed for 4 steps" in result.message
    assert "--at STEP" in result.hint
    result = assert_refused("resume", run, beside=tmp_path)
    assert result.hint == f"npo resume {run} --at 4 --no-guide train.num_steps=8"


# Names and guides


@pytest.mark.parametrize("name", ["../x", "", "x" * 65, "ünicode", ".hidden", "a/b", "a b", "a\n"])
@pytest.mark.parametrize(
    "args",
    [
        ["sample-guide", "--at", "0", "--source", "4", "--name"],
        ["resume", "--at", "0", "--guide"],
        ["resume", "--at", "0", "--guide", "near", "--new-branch"],
    ],
)
def test_invalid_name_is_refused(circle, args, name):
    assert words(circle, *args, name).startswith(f"{name!r} cannot name a guide or a branch")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["sample-guide", "--branch", "main", "--at", "0", "--source", "4", "--name", "near"],
            "RUN already has a complete guide 'near' (step 4 for step 0) | choose another name with --name, or use it: "
            "npo resume RUN --at 0 --guide near",
        ),
        (
            ["resume", "--at", "0", "--guide", "far"],
            "RUN has no guide 'far'; it has: near | make one: npo sample-guide RUN --source STEP --at STEP --name far",
        ),
        (
            ["resume", "--at", "2", "--guide", "near"],
            "guide near was sampled for step 0 of main, not step 2 of main "
            "| npo sample-guide RUN --branch main --source checkpoint:4 --at 2 --name NEW",
        ),
        (
            ["resume", "--at", "0", "--guide", "near", "--new-branch", "main"],
            "RUN already has a branch 'main' | choose an",
        ),
    ],
)
def test_guide_or_branch_that_does_not_fit_is_refused(circle, args, expected):
    assert words(circle, *args).startswith(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"run_id": "0" * 32}, "guide 'near' was made in another run"),
        ({"tokenizer_digest": "0" * 64}, "guide near was sampled with another tokenizer"),
        ({"complete": False}, "is incomplete"),
        ({"num_prompts_with_rollouts": 99}, "prompts with responses, but guide.json counts 99"),
    ],
)
def test_guide_cache_of_another_run_or_incomplete_is_refused(circle, tmp_path, fields, message):
    run = copy_run(circle, tmp_path)
    set_fields(run / "guides" / "near" / "guide.json", **fields)
    result = assert_refused("resume", run, "--at", "0", "--guide", "near", beside=tmp_path)
    assert message in result.message


def test_guide_cache_copied_from_another_run_is_refused(circle, tmp_path):
    run = tmp_path / "other"
    assert npo("train", "micro", run, *SMALL, "train.seed=1").code == 0
    shutil.copytree(circle / "guides", run / "guides")
    result = assert_refused("resume", run, "--at", "0", "--guide", "near", beside=tmp_path)
    assert result.message.startswith("guide 'near' was made in another run")
    assert result.hint == f"make one here: npo sample-guide {run} --source checkpoint:4 --at 0"


def test_resume_refuses_a_weights_only_checkpoint(circle, tmp_path):
    run = copy_run(circle, tmp_path)
    demote_checkpoint(find_checkpoint(RunDir(run), "main", 2))
    result = assert_refused("resume", run, "--branch", "main", "--at", "2", "--no-guide", beside=tmp_path)
    assert result.message == "step 2 of main has weights only; training cannot continue from it"
    anew = f"npo resume {run} --at 2 --no-guide --fresh-optimizer"
    assert result.hint == f"choose a full checkpoint (npo index {run}), or start with a new optimizer: {anew}"


def test_guide_cache_of_more_than_an_epoch_samples_each_prompt_once(circle, tmp_path):
    run = copy_run(circle, tmp_path)
    steps = (
        "--branch",
        "main",
        "--at",
        "0",
        "--source",
        "4",
        "--steps",
        10**12,
        "--name",
        "long",
        "guide.cache.prompts=all",
        "guide.cache.samples_per_prompt=1",
        "guide.cache.min_yield=0",
    )
    result = npo("sample-guide", run, *steps, "--json")
    assert json_rows(result.out)[0]["num_prompts"] == 16
