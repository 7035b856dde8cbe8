"""Disposable scouts: trained, used as guide and teacher, paid for, dropped, killed; and what is refused."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from npo_cli.errors import NpoError
from npo_cli.session.session import open_policy, open_task
from npo_cli.session.stop_signal import StopFlag
from npo_cli.storage.checkpoints import list_checkpoints
from npo_cli.storage.cost_sums import best_held_curve, cost_at, costs_by_activity, read_cost_table
from npo_cli.storage.costs import read_cost_lines
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.interrupted import list_interrupted_branches
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_first_segment, find_newest_branch
from npo_cli.storage.removal import plan_removal
from npo_cli.storage.scouts import has_ended, list_scout_uses, read_scout_recipe
from npo_cli.training.scout import scout_run, train_scout
from npo_cli.types.guides import ScoutRequest
from npo_cli.types.rollouts import StepReport
from tests.helpers.runs import (
    copy_run,
    open_session_at,
    reproducible_digests,
    resume,
    sample,
    start_resume,
    steps_of,
    stop_after,
    train,
    trajectories,
)

TEACH = ("target.kind=distribution", "target.teacher=scout:s")
WINDOW = ("target.num_steps=2", "target.group_size=2", "train.num_steps=6")


def start_scout(root: Path, *overrides: str, **options: Any) -> Any:
    return scout_run(root, request(*overrides, **options))


def request(*overrides: str, **options: Any) -> ScoutRequest:
    return ScoutRequest(**{"at": 2, "branch": "main", "steps": 2, "name": "s"} | options, overrides=overrides)


def train_one(root: Path, *overrides: str, **options: Any) -> list[StepReport]:
    return steps_of(start_scout(root, *overrides, **options))


def rows_of(run: RunDir, branch: str) -> list[dict[str, Any]]:
    """Metrics without the name of the branch."""
    rows = map(json.loads, run.metrics_path(branch).read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "branch"} for row in rows]


def saved_steps(run: RunDir, branch: str) -> list[int]:
    return [found.step for found in list_checkpoints(run, branch)]


def test_scout_without_settings_is_the_branch_that_a_fork_would_be(scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("scout", "fork")]
    train_one(roots[0])
    resume(roots[1], at=2, new_branch="s")
    assert reproducible_digests(roots[0], "s") == reproducible_digests(roots[1], "s")
    segment = json.loads((roots[0] / "segments.jsonl").read_text().splitlines()[-1])
    assert segment["is_scout"] is True
    assert "is_scout" not in (roots[1] / "segments.jsonl").read_text()


def test_scout_settings_are_those_of_a_run_with_them(tmp_path):
    """With the seeds of main a scout from step 0 is, number for number, a run with these settings."""
    changes = {"num_updates": "2", "lr": "1e-3", "prompts_per_step": "2", "group_size": "6"}
    train(tmp_path / "run", *(f"train.{key}={value}" for key, value in changes.items()))
    train(tmp_path / "base", "autonpo.rollback.seed=same", until=0)
    overrides = (f"scout.{key}={value}" for key, value in changes.items())
    train_one(tmp_path / "base", *overrides, "scout.num_steps=4", at=0, steps=None)
    assert rows_of(open_run(tmp_path / "base"), "s") == rows_of(open_run(tmp_path / "run"), "main")
    recipe = read_scout_recipe(open_run(tmp_path / "base"), "s")
    assert (recipe.train.lr, recipe.train.group_size, recipe.train.num_steps) == (1e-3, 6, 4)
    assert recipe.scout_overrides == {} and recipe.eval.every == 0


def test_scout_teaches_is_paid_for_and_is_dropped_after_the_window(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    run = open_run(root)
    trained = train_one(root, "scout.num_updates=2", "scout.group_size=6")
    assert [report.step for report in trained] == [3, 4]
    assert saved_steps(run, "s") == [4]
    records = start_resume(root, *TEACH, *WINDOW, at=2, new_branch="dense")
    stop_after(records, 3)
    assert find_first_segment(run, "dense").teacher == ("s", 4)
    assert run.read_recipe("dense")["target"]["teacher"] == "scout:s@4"
    assert [str(use) for use in list_scout_uses(run, "s") if not use.is_over] == ["branch dense"]
    with pytest.raises(NpoError, match="branch dense depend on branch s"):
        plan_removal(run, "s", recursive=False)
    # Step 3 is read back with the teacher, the window ends with step 4, whose checkpoint drops the scout.
    reports = resume(root, source_branch="dense")
    assert [report.metrics.get("target/coefficient") for report in reports] == [1.0, 1.0, None, None]
    assert all(report.metrics["target/kl"] > 0 for report in reports[:2])
    assert saved_steps(run, "s") == []
    assert len(rows_of(run, "s")) == 2 and run.rollouts_path("s").exists()
    assert resume(root, "train.num_steps=7", source_branch="dense")[0].step == 7

    fork = next(line for line in read_cost_lines(run) if (line.kind, line.branch) == ("fork", "dense"))
    assert (tuple(fork.charged), fork.until) == (("branches/s",), None)
    table, own = read_cost_table(run), sum(int(report.metrics["tokens"]) for report in reports)
    paid = sum(int(report.metrics["tokens"]) for report in trained)
    assert cost_at(run, "dense", 6).tokens == cost_at(run, "main", 2).tokens + paid + own
    assert cost_at(run, "dense", 6).updates == 2 + 2 * 2 + 4
    assert min(step.seconds for step in table.steps["s"].values()) > 0
    assert cost_at(run, "dense", 6).seconds > cost_at(run, "main", 2).seconds + sum(
        step.seconds for step in (*table.steps["s"].values(), *table.steps["dense"].values()) if step.updates == 2
    )
    (row,) = [one for one in costs_by_activity(run, "dense") if one.activity == "training of scouts"]
    assert (row.steps, row.tokens) == (2, paid)
    assert best_held_curve(run, "dense", name="dense") == []
    # The same scout again, further down the line, is paid for once.
    with pytest.raises(NpoError, match="the checkpoints of scout s were dropped when used: branch dense"):
        resume(root, *TEACH, at=2, new_branch="again")
    plan_removal(run, "s", recursive=False)


def test_scout_guides_and_is_dropped_when_the_cache_is_complete(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    run = open_run(root)
    paid = sum(int(report.metrics["tokens"]) for report in train_one(root, "scout.lr=1e-3"))
    info = sample(root, source="scout:s", name="taught")
    assert (info.source.text, info.guide_step, info.num_steps) == ("scout:s@4", None, 2)
    assert info.scout == ("s", 4)
    assert saved_steps(run, "s") == []
    assert {one.sampler_step for one in trajectories(root, "taught").values()} == {4}
    # main's checkpoint of the same step answers otherwise
    assert trajectories(root, "taught") != trajectories(root, "near")
    reports = resume(root, "guide.inject.max_accuracy=1", at=2, guide="taught", new_branch="npo")
    assert all(report.metrics["inject/slots"] > 0 for report in reports)
    own = sum(int(report.metrics["tokens"]) for report in reports)
    assert cost_at(run, "npo", 4).tokens == cost_at(run, "main", 2).tokens + paid + info.num_tokens + own
    assert find_newest_branch(run) == "npo"


@pytest.mark.slow
def test_scout_that_is_kept_serves_twice_and_is_paid_for_once(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    run = open_run(root)
    paid = sum(int(report.metrics["tokens"]) for report in train_one(root, "scout.keep=true"))
    info = sample(root, source="scout:s@4", name="taught")
    reports = resume(root, *TEACH, *WINDOW, at=2, guide="taught", new_branch="both")
    assert saved_steps(run, "s") == [4]
    own = sum(int(report.metrics["tokens"]) for report in reports)
    total = cost_at(run, "main", 2).tokens + paid + info.num_tokens + own
    assert cost_at(run, "both", 6).tokens == total
    (later,) = resume(root, *TEACH, "target.start_step=6", "train.num_steps=7", at=6, source_branch="both")
    assert cost_at(run, later.branch, 7).tokens == total + int(later.metrics["tokens"])


def test_scout_ends_by_its_reward_and_so_it_does_after_a_kill(scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("straight", "dropped")]
    settings = ("scout.stop_reward=0", "scout.stop_window=3", "train.save_every=2", "scout.num_updates=2")
    reports = train_one(roots[0], *settings, steps=8)
    assert [report.step for report in reports] == [3, 4, 5]
    assert has_ended(open_run(roots[0]), "s") and saved_steps(open_run(roots[0]), "s") == [4, 5]
    # Step 5 is recorded and not saved, so it is trained again; then it is saved, and only the end was not recorded.
    stop_after(start_scout(roots[1], *settings, steps=8), 5)
    run = open_run(roots[1])
    assert list_interrupted_branches(run) == ["s"]
    with pytest.raises(NpoError, match="scout s has not ended"):
        sample(roots[1], source="scout:s", name="early")
    assert [report.step for report in resume(roots[1])] == [5]
    assert reproducible_digests(roots[1], "s") == reproducible_digests(roots[0], "s")
    assert train_one(roots[1], *settings, steps=8) == []


def test_scout_that_was_killed_before_its_end_was_recorded_trains_nothing_more(scout, tmp_path, monkeypatch):
    root = copy_run(scout, tmp_path / "run")
    settings = ("scout.stop_reward=0", "scout.stop_window=1")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("npo_cli.training.resume.record_finish", interrupt)
        train_one(root, *settings)
    assert saved_steps(open_run(root), "s") == [3] and not has_ended(open_run(root), "s")
    assert train_one(root, *settings) == []
    assert has_ended(open_run(root), "s") and saved_steps(open_run(root), "s") == [3]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_scout_in_an_open_session_is_the_same(scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("command", "session")]
    train_one(roots[0], "scout.num_updates=2")
    with closing(open_session_at(roots[1], 4)) as session:
        wanted = request("scout.num_updates=2")
        assert [report.step for report in steps_of(train_scout(session, wanted, StopFlag()))] == [3, 4]
        assert steps_of(train_scout(session, wanted, StopFlag())) == []
        with pytest.raises(NpoError, match="another model than the one of this session"):
            list(train_scout(session, request("scout.lora.rank=2", name="l"), StopFlag()))
    assert reproducible_digests(roots[1], "s") == reproducible_digests(roots[0], "s")


@pytest.mark.slow
def test_scout_with_adapters_trains_them_on_the_frozen_step(scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("straight", "dropped", "moved")]
    lora = ("scout.lora.rank=2", "scout.lr=1e-2", "scout.keep=true")
    train_one(roots[0], *lora, steps=3)
    run = open_run(roots[0])
    (folder,) = [found.path for found in list_checkpoints(run, "s") if found.step == 5]
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    assert run.read_recipe("s")["model"]["path"] == run.read_recipe("main")["model"]["path"]
    # Killed before its first checkpoint, moved to another folder, and resumed.
    stop_after(start_scout(roots[1], *lora, steps=3), 3)
    roots[2].rename(tmp_path / "away")
    roots[1].rename(roots[2])
    assert [report.step for report in train_one(roots[2], *lora, steps=3)] == [3, 4, 5]
    straight, moved = (reproducible_digests(root, "s") for root in (roots[0], roots[2]))
    differing = {Path(name).name for name in straight if moved[name] != straight[name]}
    assert differing == {"adapter_config.json"}  # it holds the path of the frozen step
    # Guide and teacher are the frozen step with the adapters.
    task = open_task(read_scout_recipe(run, "s"))
    with closing(task):
        policy = open_policy(read_scout_recipe(run, "s"), task, list_checkpoints(run, "s")[-1])
    assert any(tensor.any() for name, tensor in policy.adapter_weights.items() if "lora_B" in name)
    frozen = open_session_at(roots[0], 2, branch="main").policy.model.state_dict()
    own = policy.base_weights
    assert all(torch.equal(own[name], frozen[name]) for name in own)
    sample(roots[0], "guide.cache.keep=all", source="scout:s", name="taught")
    prompt_id, guide = next(iter(trajectories(roots[0], "taught").items()))
    prompt_ids = policy.encode(task.prompt(prompt_id))
    logits_LW = policy.model(torch.tensor([[*prompt_ids, *guide.response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    logps_T = logits_LW.log_softmax(-1).gather(1, torch.tensor(guide.response_ids)[:, None])[:, 0]
    assert torch.tensor(guide.behavior_logps) == pytest.approx(logps_T.detach(), abs=1e-4)
    reports = resume(roots[0], *TEACH, *WINDOW, at=2, new_branch="dense")
    assert all(report.metrics["target/kl"] > 0 for report in reports[:2])


@pytest.mark.slow
def test_scout_from_weights_alone_has_a_new_optimizer(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    shutil.rmtree(root / "branches/main/checkpoints/step_000002/training_state")
    stop_after(start_scout(root, steps=3), 3)
    assert [report.step for report in train_one(root, steps=3)] == [3, 4, 5]


@pytest.mark.slow
def test_scout_of_a_lazy_cache_is_dropped_when_the_replay_is_over(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    train_one(root, "scout.lr=1e-3")
    sample(root, "guide.cache.lazy=true", source="scout:s", name="lazy")
    assert saved_steps(open_run(root), "s") == [4]
    resume(root, "guide.inject.max_accuracy=1", "train.num_steps=6", at=2, guide="lazy", new_branch="npo")
    assert saved_steps(open_run(root), "s") == []
    assert load_guide(open_run(root), "lazy")[0].num_samples > 0


# Refusals


@pytest.fixture(scope="module")
def scouted(scout, tmp_path_factory) -> Path:
    """A run with the scout `s` of step 2 and a branch `side` that left main at step 2."""
    root = copy_run(scout, tmp_path_factory.mktemp("scouted") / "run")
    train_one(root)
    resume(root, at=2, new_branch="side", until=4)
    return root


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ((), {"at": 3, "name": "n"}, "no complete checkpoint of step 3"),
        ((), {"name": "side"}, "already has a branch 'side', which is no scout from step 2 of main"),
        ((), {"at": 4}, "already has a branch 's', which is no scout from step 4 of main"),
        (("scout.lr=0.5",), {}, "already has a scout s, with train.lr=0.0003 instead of 0.5"),
        ((), {"steps": 9}, "already has a scout s, with train.num_steps=4 instead of 11"),
        ((), {"name": "n", "steps": None}, "the recipe has no scout.num_steps"),
        ((), {"name": "n", "branch": "s"}, "s is a scout, which is not scouted from"),
        (("scout.num_updates=3",), {"name": "n"}, "of a scout: train.num_updates must divide"),
        (("scout.prompts_per_step=99",), {"name": "n"}, "of a scout: task.pool_size must be at least"),
        (("scout.group_size=1",), {"name": "n"}, "scout.group_size must be"),
        (("scout.lora.alpha=3",), {"name": "n"}, "scout.lora.alpha has no effect without scout.lora.rank"),
        (("eval.every=1",), {"name": "n"}, "eval.every has no effect on a scout"),
        (("train.seed=3",), {"name": "n"}, "train.seed cannot change"),
    ],
    ids=str,
)
def test_scout_is_refused(scouted, overrides, options, message):
    with pytest.raises(NpoError) as caught:
        train_one(scouted, *overrides, **options)
    assert message in caught.value.message
    assert not (scouted / "branches/n").exists()


def test_scout_is_no_learner_no_parent_and_no_teacher_of_another_line(scouted):
    for refused, message in (
        (lambda: resume(scouted, at=4, source_branch="s", new_branch="n"), "s is a scout, which no branch is forked"),
        (lambda: resume(scouted, at=2, new_branch="n", merge="s:4,weight=1"), "s is a scout, which is not merged"),
        (lambda: sample(scouted, source="self", branch="s", name="n"), "s is a scout, which is no learner"),
        (lambda: resume(scouted, "target.kind=distribution", "target.teacher=scout:side", at=2), "side is no scout"),
        (lambda: resume(scouted, *TEACH[:1], "target.teacher=scout:gone", at=2), "has no branch 'gone'"),
        (lambda: resume(scouted, *TEACH[:1], "target.teacher=scout:s@3", at=2), "no complete checkpoint of step 3"),
        (lambda: resume(scouted, *TEACH[:1], "target.teacher=scout:s@2", at=2), "is a step of main, before scout s"),
    ):
        with pytest.raises(NpoError) as caught:
            refused()
        assert message in caught.value.message
