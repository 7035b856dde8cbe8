"""Whole runs that train adapters: the circle, the base that everything rests on, and what a guide costs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npo_cli.autonpo.run import train_autonpo
from npo_cli.config.loading import override_saved_recipe
from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.rollout.batch import add_advantages
from npo_cli.session.session import Session
from npo_cli.storage import files
from npo_cli.storage.checkpoints import find_checkpoint, list_checkpoints
from npo_cli.storage.index import index_run
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.verify import verify_run
from npo_cli.training.checkpointing import restore_state, save_checkpoint
from npo_cli.training.evaluate import evaluate_run
from npo_cli.training.train import load_reference_policy, train_run
from npo_cli.training.update import Updater, build_training_samples
from npo_cli.types.rollouts import Notice
from tests.helpers.autonpo_runs import deterministic_digests, eager_recipe, events_of
from tests.helpers.runs import (
    LORA,
    copy_run,
    file_digests,
    open_session_at,
    resume,
    sample,
    score,
    steps_of,
    tiny_recipe,
    train,
)


@pytest.fixture(scope="module")
def circled(tmp_path_factory) -> Path:
    """Trained, scored, a guide sampled, rolled back, replayed."""
    root = tmp_path_factory.mktemp("lora") / "run"
    train(root, *LORA)
    assert [
        found.step
        for found in score(
            root, "scoring.num_prompts=8", "scoring.samples_per_prompt=2", "guide.inject.max_accuracy=1.0"
        )
    ] == [2, 4]
    assert sample(root).complete
    assert [report.step for report in resume(root, at=2, guide="near")] == [3, 4]
    return root


def adapter(root: Path, step: int, branch: str = "main") -> Path:
    return root / "branches" / branch / "checkpoints" / f"step_{step:06d}" / "adapter_model.safetensors"


def test_lora_checkpoint_holds_adapters_only(circled):
    names = {path.name for path in adapter(circled, 4).parent.iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "npo_base.json", "npo.json", "training_state"}
    first, last = (load_file(adapter(circled, step)) for step in (0, 4))
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)
    assert all(not torch.equal(first[name], tensor) for name, tensor in last.items())
    moments = load_file(adapter(circled, 4).parent / "training_state" / "optimizer.safetensors")
    # three entries a tensor: exp_avg, exp_avg_sq, step
    assert sum(".lora_" in name for name in moments) == 3 * len(last) == len(moments) - 1


def test_lora_guide_is_the_adapter_of_its_step(circled):
    groups = [RolloutLog(open_run(circled).rollouts_path("near")).read_step(step) for step in (3, 4)]
    rollouts = [rollout for group in (*groups[0], *groups[1]) for rollout in group.rollouts]
    assert {each.sampler_step for each in rollouts if each.source == "guide"} == {4}
    assert json.loads((circled / "guides" / "near" / "guide.json").read_text())["guide_step"] == 4


def test_lora_run_is_read_by_every_command(circled, tmp_path):
    root = copy_run(circled, tmp_path / "run")
    *damages, verdict = verify_run(root)
    assert (damages, verdict.num_damages) == ([], 0)
    entries = index_run(root)
    assert {(entry.branch, entry.step) for entry in entries} == {("main", 0), ("main", 2), ("main", 4), ("near", 4)}
    assert all(entry.complete and entry.digest for entry in entries)
    records = list(evaluate_run(root, step=2, every_step=False, branch="main", overrides=()))
    assert records[-1].step == 2


def test_lora_retention_keeps_weights_only_checkpoints(tmp_path):
    root = tmp_path / "run"
    train(root, *LORA, "train.save_every=1", "train.keep_full_checkpoints=1", "train.keep_weights_only=1")
    kept = [(found.step, found.tier) for found in list_checkpoints(open_run(root), "main")]
    assert kept == [(0, "full"), (3, "weights"), (4, "full")]


def test_lora_checkpoint_needs_disk_space_for_adapters_only(circled, monkeypatch, tmp_path):
    session = open_session_at(copy_run(circled, tmp_path / "run"), 4, branch="main")
    optimizer = build_optimizer(session.policy.model, session.recipe.train)
    state = restore_state(session, optimizer, find_checkpoint(session.run, "main", 4))
    # adapters and two moments: 3 layers x 4 (4 x 192 + 3 x 288) floats of 4 bytes, three times
    needed = 3 * 3 * 4 * (4 * 192 + 3 * 288) * 4
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": needed - 1}))
    with pytest.raises(RunFailed, match=r"needs 0\.2 MB and the disk has 0\.2 MB left"):
        save_checkpoint(session, optimizer, state, branch="main")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": needed}))
    save_checkpoint(session, optimizer, state, branch="main")


def one_update(root: Path, reference_of: Callable[[Session], Policy]) -> tuple[float, float, str]:
    """Loss, gradient norm and weights after step 4's batch was learned once more, with a penalty for divergence."""
    session = open_session_at(root, 4, branch="main")
    recipe = override_saved_recipe(session.run.read_recipe("main"), (), path=root, purpose="measure")
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"kl_coef": 0.5})})
    groups = RolloutLog(session.run.rollouts_path("main")).read_step(4)
    optimizer = build_optimizer(session.policy.model, recipe.train)
    updater = Updater(session.policy, optimizer, recipe, reference=reference_of(session))
    report = updater.take_step(
        build_training_samples(session.policy, add_advantages(session, groups), recipe.guide.inject), lr=1e-3
    )
    return report.loss, report.grad_norm, session.policy.digest


def test_lora_kl_reference_is_the_base(circled, tmp_path):
    root = copy_run(circled, tmp_path / "run")
    switched_off = one_update(root, load_reference_policy)
    assert switched_off == one_update(root, lambda session: load_policy(ModelSettings(threads=1)))
    assert switched_off[0] > one_update(root, lambda session: session.policy)[0]


def test_lora_adapters_are_float32_on_a_bfloat16_base(tmp_path):
    noticed = {}
    for kind in ((), LORA):
        records = list(train_run(tmp_path / str(len(kind)), tiny_recipe("model.dtype=bfloat16", *kind)))
        noticed[kind] = any(isinstance(each, Notice) and "rounded" in each.message for each in records)
    assert noticed == {(): True, LORA: False}


# The base


def own_base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MICRO_BASE_FOLDER, tmp_path / "base"))


def test_lora_run_is_resumed_from_any_folder_and_with_a_moved_base(tmp_path, monkeypatch):
    own_base(tmp_path)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "run"
    train(root, *LORA, "model.path=base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(resume(root, "train.num_steps=5")) == 1
    (tmp_path / "base").rename(tmp_path / "elsewhere" / "moved")
    with pytest.raises(NpoError, match="there is no folder"):
        resume(root, "train.num_steps=6")
    assert len(resume(root, "train.num_steps=6", "model.path=moved")) == 1
    monkeypatch.chdir(tmp_path)
    assert len(resume(root, "train.num_steps=7")) == 1


def test_lora_base_with_other_weights_is_refused(circled, tmp_path):
    base = own_base(tmp_path)
    other = load_policy(ModelSettings(threads=1))
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.01)
    other.save(base)
    before = file_digests(circled)
    with pytest.raises(NpoError, match="belong to another base"):
        resume(circled, "train.num_steps=9", f"model.path={base}")
    with pytest.raises(NpoError, match="belong to another base"):
        score(circled, f"model.path={base}")
    assert file_digests(circled) == before


def test_lora_rank_and_alpha_cannot_change(circled, scout):
    for setting in ("model.lora.rank=8", "model.lora.rank=null", "model.lora.alpha=1.0", "model.lora.seed=1"):
        with pytest.raises(NpoError, match=f"{setting.partition('=')[0]} cannot change from"):
            resume(circled, setting)
    with pytest.raises(NpoError, match=r"model\.path cannot change from"):
        resume(scout, "model.path=elsewhere")


# AutoNPO


@pytest.mark.slow
@pytest.mark.parametrize(
    "early",
    [(), ("autonpo.early.enabled=true", "autonpo.early.scout_steps=4", "autonpo.early.replay_steps=4")],
    ids=["late", "early"],
)
def test_lora_run_with_autonpo_intervention(tmp_path, early):
    root = tmp_path / "run"
    steps_of(train_autonpo(root, eager_recipe(*LORA, *early)))
    assert {"guide_built", "rolled_back", "replay_done"} <= set(events_of(root))
    assert any("adapter_model" in name for name in deterministic_digests(root) if name.startswith("branches/auto-1/"))
