"""Plans as commands, and what is left of a command after a kill; on runs made by the stages themselves."""

import shutil
from pathlib import Path

import pytest
import yaml

from npo_cli.errors import NpoError
from npo_cli.experiments.bench_plan import BenchRun, build_commands, check_plan, find_remaining_command, list_spans
from tests.helpers.cli_errors import npo
from tests.helpers.runs import TINY, WHOLE_REPLAY, copy_run, resume, sample, train


def bench_run(folder: Path, method: str, *settings: str, teacher: str = "") -> BenchRun:
    settled = (*TINY, *settings)
    return BenchRun(recipe="micro", method=method, settings=settled, seed=7, folder=folder, teacher=teacher)


def as_typed(found: list[tuple[str, ...]], folder: Path) -> list[str]:
    """As a person would type them; the settings of the run's birth left out."""
    return [" ".join(word for word in words if "=" not in word).replace(str(folder / "run"), "RUN") for words in found]


def test_bench_plan_of_npo_early_and_late_is_five_commands(tmp_path):
    here = bench_run(
        tmp_path,
        "matched/npo",
        "guide.replay.at_step=2",
        "guide.replay.guide_step=4",
        "autonpo.early.scout_steps=3",
        "autonpo.early.replay_steps=4",
    )
    found = build_commands(here)
    assert as_typed(found, tmp_path) == [
        "train micro RUN --method matched/npo --until 3",
        "sample-guide RUN --at 0 --source 3 --steps 2 --name early",
        "resume RUN --at 0 --guide early --new-branch early --until 4",
        "sample-guide RUN --branch early --at 2 --source 4 --name late",
        "resume RUN --at 2 --branch early --guide late --new-branch npo",
    ]
    assert found[0][-1] == "train.seed=7"
    assert set(TINY) < set(found[0])
    assert not any("=" in word for words in found[1:] for word in words)


def test_bench_plan_with_periods_repeats_to_the_last_step(tmp_path):
    found = build_commands(bench_run(tmp_path, "controls/forward-probe", "train.num_steps=50"))
    assert as_typed(found, tmp_path)[0].endswith("--until 0")
    assert as_typed(found, tmp_path)[-2:] == [
        "sample-guide RUN --branch probe-20 --at 40 --source self --steps 10 --name probe-40",
        "resume RUN --branch probe-20 --at 40 --guide probe-40 --new-branch probe-40 --until 50",
    ]
    assert "--branch main" in as_typed(found, tmp_path)[1]
    assert len(found) == 1 + 2 * 3


def test_bench_plan_teacher_options_depend_on_the_seed(tmp_path):
    found = build_commands(bench_run(tmp_path, "luffy", teacher="--source file --from 'my traces-{seed}.jsonl'"))
    assert found[1][-6:] == ("--source", "file", "--from", "my traces-7.jsonl", "--name", "teacher")


def test_bench_plan_refuses_missing_settings(tmp_path):
    with pytest.raises(NpoError, match="method luffy needs a teacher"):
        build_commands(bench_run(tmp_path, "luffy"))
    with pytest.raises(NpoError, match=r"method npo-late needs guide.replay.guide_step"):
        build_commands(bench_run(tmp_path, "npo-late", "guide.replay.at_step=2"))


def test_bench_plan_without_a_branch_is_about_main_as_the_commands_are(tmp_path):
    """The branch `one` has step 20, `main` does not."""
    method = tmp_path / "twice.yaml"
    commands = ["train {recipe} {run} --method {method} --until 0"]
    commands += ["resume {run} --at 0 --no-guide --new-branch one", "resume {run} --at 4 --no-guide --new-branch two"]
    method.write_text(yaml.safe_dump({"method": {"name": "twice", "commands": commands}}))
    with pytest.raises(NpoError, match=r"needs a checkpoint of step 4 .* branch main will have one .* up to 0 only"):
        check_plan(bench_run(tmp_path, str(method)))


def test_bench_plan_skips_done_commands_and_resumes_an_interrupted_one(scout, tmp_path):
    """The scout has 4 steps on main and the guide `near`."""
    here = bench_run(tmp_path, "matched/npo-late", "guide.replay.at_step=2", "guide.replay.guide_step=4")
    training, sampling, replayed = build_commands(here)
    assert find_remaining_command(training, here) == training
    root = copy_run(scout, here.run)
    assert find_remaining_command(training, here) is None
    longer = (*training[:-1], "train.seed=7")
    assert longer == training
    further = tuple("6" if word == "4" else word for word in training)
    assert find_remaining_command(further, here) == ("resume", str(root), "--branch", "main", "--until", "6")
    assert find_remaining_command(sampling, here) == sampling
    sample(root, name="late")
    assert find_remaining_command(sampling, here) is None
    assert find_remaining_command(replayed, here) == replayed
    resume(root, at=2, guide="late", new_branch="npo", until=3)
    assert find_remaining_command(replayed, here) == ("resume", str(root), "--branch", "npo", "--until", "4")
    resume(root, source_branch="npo")
    assert find_remaining_command(replayed, here) is None


def test_bench_plan_restarts_a_run_killed_before_its_first_checkpoint(tmp_path):
    here = bench_run(tmp_path, "controls/base-guide")
    train(here.run, until=0)
    training = build_commands(here)[0]
    assert find_remaining_command(training, here) is None
    shutil.rmtree(here.run / "branches" / "main" / "checkpoints")
    assert find_remaining_command(training, here) == training
    assert not here.run.exists()


def test_method_plans_of_dense_targets_name_the_later_checkpoint_as_teacher(tmp_path):
    steps = ("guide.replay.at_step=2", "guide.replay.guide_step=4")
    for method, kind in (("matched/distill", "distribution"), ("matched/token-weight", "token_weight")):
        first, second = build_commands(bench_run(tmp_path, method, *steps))
        assert first[first.index("--until") + 1] == "4"
        assert {f"target.kind={kind}", "target.teacher=checkpoint:4", "--no-guide"} <= set(second)
        assert second[second.index("--at") + 1] == "2"
    for method in ("controls/distill-self", "controls/small-groups"):
        first, second = build_commands(bench_run(tmp_path, method, *steps))
        assert first[first.index("--until") + 1] == "2"
        assert "target.teacher=self" in second


def test_method_plans_of_scouts_train_one_from_the_base_and_skip_it_once_it_was_used(tmp_path):
    settings = ("scout.num_steps=2", "train.num_steps=4", *WHOLE_REPLAY)
    here = bench_run(tmp_path, "matched/npo-scout", *settings)
    check_plan(here)
    assert as_typed(build_commands(here), tmp_path) == [
        "train micro RUN --method matched/npo-scout --until 0",
        "scout RUN --at 0 --name scout",
        "sample-guide RUN --at 0 --source scout:scout --name early",
        "resume RUN --at 0 --guide early --new-branch npo",
    ]
    spans = [(span.command[0], span.branch, span.first, span.last) for span in list_spans(here)]
    assert spans == [
        ("train", "main", 0, 0),
        ("scout", "main", 0, 2),
        ("sample-guide", "main", 0, 2),
        ("resume", "main", 0, 4),
    ]
    training, scouting, sampling, _ = build_commands(here)
    npo(*map(str, training))
    assert find_remaining_command(scouting, here) == scouting
    for command in (scouting, sampling):
        assert npo(*command).code == 0
        assert find_remaining_command(command, here) is None
    assert find_remaining_command(scouting, here) is None
    with pytest.raises(NpoError, match=r"needs scout.num_steps"):
        check_plan(bench_run(tmp_path, "matched/npo-scout", "scout.num_steps=null"))
