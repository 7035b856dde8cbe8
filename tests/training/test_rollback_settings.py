"""The settings of a rollback: whose moments, which prompts, which sampling seeds the replay begins with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npo_cli.policy.optimizer import TrainerState, build_optimizer
from npo_cli.session.session import build_session, open_policy, open_task
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.training.resume import load_first_state
from npo_cli.training.start_point import fork
from tests.helpers.autonpo_runs import groups_of, prompt_ids
from tests.helpers.runs import copy_run, open_session_at, reproducible_digests, resume, sample, start_resume, stop_after


@pytest.fixture(scope="module")
def guided(plain, tmp_path_factory) -> Path:
    """The 12 plain steps, and a guide cache of step 8 for a learner at step 4."""
    root = copy_run(plain, tmp_path_factory.mktemp("guided") / "run")
    sample(root, at=4, source="8", name="near")
    return root


def begun(root: Path, *overrides: str, guide: str | None = None) -> tuple[dict[str, Any], TrainerState]:
    """Moments by name, and the state, with which a branch that leaves main at step 4 begins."""
    run = open_run(root)
    start = fork(run, "main", 4, overrides=overrides, guide=guide, new_branch="new", steps=None)
    task = open_task(start.recipe)
    session = build_session(run, start.recipe, task=task, policy=open_policy(start.recipe, task, start.checkpoint))
    optimizer = build_optimizer(session.policy.model, start.recipe.train)
    doing = load_first_state(session, optimizer, start)
    with pytest.raises(StopIteration) as done:
        next(doing)
    moments = {
        f"{name}.{key}": value
        for name, parameter in session.policy.model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return moments, done.value.value


def saved(root: Path, step: int) -> dict[str, Any]:
    tensors = load_file(find_checkpoint(open_run(root), "main", step).training_state_path / "optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")}


def check_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_rollback_restores_the_moments_of_the_old_step(guided):
    moments, state = begun(guided)
    check_equal(moments, saved(guided, 4))
    # 4 steps of 4 prompts
    assert (state.step, state.position) == (4, 16)


def test_rollback_with_reset_optimizer_has_no_moments(guided):
    moments, state = begun(guided, "autonpo.rollback.optimizer=reset")
    assert moments == {}
    assert (state.step, state.position) == (4, 16)


@pytest.mark.parametrize(("guide", "step"), [("near", 8), (None, 12)])
def test_rollback_keeps_the_moments_of_the_current_policy(guided, guide, step):
    moments, state = begun(guided, "autonpo.rollback.optimizer=keep_current", guide=guide)
    check_equal(moments, saved(guided, step))
    assert (
        saved(guided, step)["lm_head.weight.step" if "lm_head.weight.step" in moments else next(iter(moments))]
        is not None
    )
    assert (state.step, state.position) == (4, 16)


@pytest.mark.parametrize(("guide", "step"), [("near", 8), (None, 12)])
def test_rollback_with_data_onward_continues_the_data_order(guided, guide, step):
    moments, state = begun(guided, "autonpo.rollback.data=onward", guide=guide)
    check_equal(moments, saved(guided, 4))
    # 4 prompts a step
    assert (state.step, state.position) == (4, 4 * step)


def test_rollback_weights_are_always_those_of_the_old_step(guided, tmp_path):
    """After one step without moments they differ from the step with them, and from nothing else."""
    roots = [copy_run(guided, tmp_path / name) for name in ("restored", "reset")]
    for root, settings in zip(roots, ((), ("autonpo.rollback.optimizer=reset",)), strict=True):
        resume(root, *settings, at=4, guide="near", new_branch="new")
        assert open_run(root).read_recipe("new")["autonpo"]["rollback"]["optimizer"] == (
            settings[0].split("=")[1] if settings else "restored"
        )
    first, second = (groups_of(root, "new", 5) for root in roots)
    # The rollouts of step 5 are made before anything is learned.
    assert first == second
    ours, theirs = (reproducible_digests(root, "new")["checkpoints/step_000006/model.safetensors"] for root in roots)
    assert ours != theirs


def test_rollback_with_data_onward_in_a_replay(guided, tmp_path):
    root = copy_run(guided, tmp_path / "run")
    resume(root, "autonpo.rollback.data=onward", at=4, guide="near", new_branch="new")
    session = open_session_at(root, 4, branch="main")
    coming = [prompt.prompt_id for prompt in session.prompts_between(32, 36)]
    assert prompt_ids(root, "new", 5) == coming
    assert prompt_ids(root, "new", 5) == prompt_ids(root, "main", 9)


def test_rollback_with_the_same_seed_repeats_the_original(guided, tmp_path):
    root = copy_run(guided, tmp_path / "run")
    resume(root, "autonpo.rollback.seed=same", at=4, new_branch="new")
    ours, theirs = reproducible_digests(root, "new"), reproducible_digests(root, "main")
    states = [name for name in ours if name.startswith("checkpoints/")]
    assert {name.split("/")[1] for name in states} == {f"step_{step:06d}" for step in (6, 8, 10, 12)}
    assert {name: ours[name] for name in states} == {name: theirs[name] for name in states}
    for step in range(5, 13):
        assert groups_of(root, "new", step) == groups_of(root, "main", step)


@pytest.mark.slow
def test_rollback_seed_name_is_inherited_with_seed_same_only(guided, tmp_path):
    root = copy_run(guided, tmp_path / "run")
    resume(root, "autonpo.rollback.seed=same", at=4, new_branch="new")
    resume(root, at=6, source_branch="new", new_branch="newer")
    # The recipe is handed down, so its child has the seeds of main as well ...
    assert groups_of(root, "newer", 7) == groups_of(root, "main", 7)
    resume(root, "autonpo.rollback.seed=fresh", at=6, source_branch="new", new_branch="other")
    # ... unless it wants its own: the same prompts, other samples.
    assert prompt_ids(root, "other", 7) == prompt_ids(root, "main", 7)
    assert groups_of(root, "other", 7) != groups_of(root, "main", 7)


ABLATIONS = [
    pytest.param("autonpo.rollback.optimizer=reset", marks=pytest.mark.slow),
    "autonpo.rollback.optimizer=keep_current",
    "autonpo.rollback.data=onward",
    pytest.param("autonpo.rollback.seed=same", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ABLATIONS)
def test_rollback_interrupted_before_its_first_checkpoint_starts_the_same_again(guided, tmp_path, setting):
    roots = [copy_run(guided, tmp_path / name) for name in ("straight", "dropped")]
    options: dict[str, Any] = {"at": 4, "guide": "near", "new_branch": "new"}
    resume(roots[0], setting, **options)
    stop_after(start_resume(roots[1], setting, **options), 5)
    assert not list((roots[1] / "branches/new").rglob("step_*"))
    resume(roots[1])
    assert reproducible_digests(roots[1], "new") == reproducible_digests(roots[0], "new")
