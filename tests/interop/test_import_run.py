"""Runs made from what other trainers left: every command works on them, and nothing of theirs is touched."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npo_cli.autonpo.dry_run import explain_autonpo
from npo_cli.autonpo.trainer_logs import LogColumns
from npo_cli.errors import NpoError
from npo_cli.interop.import_run import ImportSpec, import_run, infer_save_interval
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.report.build import write_report
from npo_cli.report.show import show_run
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.lock import atomic_directory
from npo_cli.storage.metrics import read_metrics
from npo_cli.training.evaluate import evaluate_run
from npo_cli.types.rollouts import CheckpointEntry, EvalReport, Notice
from npo_cli.types.views import Conclusion
from tests.helpers.other_trainers import hf_folder, trl_output
from tests.helpers.runs import TINY, file_digests, open_session_at, resume, sample, score

FEW = (
    "scoring.num_prompts=8",
    "scoring.samples_per_prompt=2",
    "scoring.bootstrap_resamples=50",
    "guide.inject.max_accuracy=1.0",
)


def importing(root: Path, home: Path, *overrides: str, metrics: Path | None = None, base: bool = False) -> Iterator:
    arguments = ImportSpec(
        source_folder=home, recipe="micro", overrides=(*TINY, *overrides), metrics=metrics, saves_base=base
    )
    return import_run(root, arguments)


def imported(root: Path, home: Path, *overrides: str, **options: object) -> tuple[list[CheckpointEntry], list[str]]:
    records = list(importing(root, home, *overrides, **options))
    messages = [record.message for record in records if isinstance(record, Notice)]
    return [record for record in records if isinstance(record, CheckpointEntry)], messages


@pytest.fixture(scope="module")
def trl_run(tmp_path_factory) -> tuple[Path, Path]:
    """(run, TRL's folder), imported once for every test that only reads or adds."""
    home = trl_output(tmp_path_factory.mktemp("trl") / "out")
    before = file_digests(home)
    entries, _ = imported(home.parent / "run", home)
    assert [(entry.step, entry.tier, entry.complete, entry.reward) for entry in entries] == [
        *((2, "weights", True, 0.125), (4, "weights", True, 0.0)),
    ]
    assert file_digests(home) == before
    return home.parent / "run", home


def test_imported_weights_are_links_that_survive_a_deleted_source(trl_run, tmp_path):
    home = trl_output(tmp_path / "out")
    imported(tmp_path / "run", home)
    here = find_checkpoint(open_run(tmp_path / "run"), "main", 4).path
    assert os.path.samefile(here / "model.safetensors", home / "checkpoint-4" / "model.safetensors")
    assert not {"optimizer.pt", "trainer_state.json"} & {path.name for path in here.iterdir()}
    shutil.rmtree(home)
    assert open_session_at(tmp_path / "run", 4).policy.digest != open_session_at(tmp_path / "run", 2).policy.digest


def test_imported_metrics_keep_their_names_and_have_data_positions(trl_run):
    rows = list(read_metrics(open_run(trl_run[0]), "main"))
    # 4 prompts a step
    assert [(row["step"], row["data_position"]) for row in rows] == [(1, 4), (2, 8), (3, 12), (4, 16)]
    history = json.loads((trl_run[1] / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    for row, said in zip(rows, history, strict=True):
        assert {name: row[name] for name in said} == said


def test_imported_run_is_scored_sampled_and_evaluated(trl_run):
    root, _ = trl_run
    (found,) = score(root, *FEW, at=2)
    assert (found.step, found.distance) == (4, 2)
    assert sample(root, "guide.inject.max_accuracy=1.0").complete
    reports = [
        one
        for one in evaluate_run(root, step=None, every_step=True, branch=None, overrides=())
        if isinstance(one, EvalReport)
    ]
    assert [one.step for one in reports] == [2, 4]


def test_imported_run_has_tables_and_a_report(trl_run, tmp_path):
    root, _ = trl_run
    assert [line.step for line in show_run(root, "metrics", branch=None, step=None, prompt_id=None, limit=None)] == [
        *(1, 2, 3, 4),
    ]
    *_, account = show_run(root, "costs", branch=None, step=None, prompt_id=None, limit=None)
    # what the other trainer spent is not on record
    assert (account.step, account.training_tokens) == (4, 0)
    list(write_report([root], tmp_path / "r.html", plots_folder=None))
    assert "Lineage" in (tmp_path / "r.html").read_text()


def test_imported_run_is_resumed_only_with_a_fresh_optimizer(trl_run):
    root, _ = trl_run
    with pytest.raises(NpoError, match="no complete checkpoint with a training state"):
        resume(root)
    with pytest.raises(NpoError, match="weights only") as refused:
        resume(root, at=2)
    assert refused.value.hint.endswith("--at 2 --no-guide --fresh-optimizer")
    sample(root, "guide.inject.max_accuracy=1.0", name="again")
    assert [one.step for one in resume(root, at=2, guide="again", fresh=True)] == [3, 4]
    # the branch has states of its own from here on
    assert [one.step for one in resume(root, "train.num_steps=5", source_branch="again")] == [5]


def test_imported_metrics_allow_a_dry_run_of_autonpo(tmp_path):
    rising = [{"step": step, "reward": min(step, 30) / 30, "entropy": 1 / step} for step in range(1, 81)]
    home = trl_output(tmp_path / "out", history=rising)
    (home / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rising))
    imported(tmp_path / "run", home, "train.num_steps=80", metrics=home / "log.jsonl")
    arguments = {
        "columns": LogColumns(),
        "overrides": ("autonpo.trigger.warmup_steps=10",),
        "branch": None,
        "figure_path": None,
        "draw": False,
    }
    from_run = list(explain_autonpo(tmp_path / "run", **arguments))
    assert any(isinstance(one, Conclusion) and "have triggered" in one.sentence for one in from_run)


def test_import_without_entropy_warns_and_refuses_the_dry_run(tmp_path):
    home = trl_output(tmp_path / "out", history=[{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}])
    _, messages = imported(tmp_path / "run", home)
    assert any(said.startswith("no column with a known name for entropy") for said in messages)
    with pytest.raises(NpoError, match="has no entropy under a known name; its numeric columns are: step, reward"):
        arguments = {"columns": LogColumns(), "overrides": (), "branch": None, "figure_path": None, "draw": False}
        list(explain_autonpo(tmp_path / "run", **arguments))


def test_import_saves_the_recipes_model_as_step_0(tmp_path):
    entries, _ = imported(tmp_path / "run", trl_output(tmp_path / "out"), base=True)
    assert [entry.step for entry in entries] == [0, 2, 4]
    zero = find_checkpoint(open_run(tmp_path / "run"), "main", 0).path
    mine, base = load_file(zero / "model.safetensors"), load_file(MICRO_BASE_FOLDER / "model.safetensors")
    assert all(torch.equal(mine[name], tensor) for name, tensor in base.items())


# verl and prime-rl


@pytest.mark.parametrize("place", ["huggingface", "model/huggingface"])  # FSDP or merged; Megatron since layout 2
def test_import_of_verl_reads_model_folders_and_skips_megatron_shards(tmp_path, place):
    home = tmp_path / "verl"
    (home / "global_step_5" / "actor" / "model" / "dist_ckpt").mkdir(parents=True)
    with pytest.raises(NpoError, match="in Megatron's shards and not merged") as refused:
        list(importing(tmp_path / "run", home))
    actor = home / "global_step_5" / "actor"
    assert refused.value.hint == (
        f"python -m verl.model_merger merge --backend megatron --local_dir {actor} --target_dir {actor / 'huggingface'}"
    )
    assert not (tmp_path / "run").exists()
    hf_folder(home / "global_step_10" / "actor" / place)
    entries, messages = imported(tmp_path / "run", home)
    assert [entry.step for entry in entries] == [10]
    assert any(said.startswith(f"skipped {home / 'global_step_5'}") for said in messages)


def test_import_of_prime_rl_reads_stable_checkpoints_and_metrics(tmp_path):
    home = tmp_path / "outputs"
    for step in (5, 10, 15):
        hf_folder(home / "weights" / f"step_{step}")
    for step in (5, 10):
        (home / "weights" / f"step_{step}" / "STABLE").touch()
    rows = [{"step": step, "reward/all/mean": step / 20, "entropy/mean": 1.0} for step in range(1, 11)]
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries, messages = imported(tmp_path / "run", home)
    assert [(entry.step, entry.reward) for entry in entries] == [(5, 0.25), (10, 0.5)]
    assert any("step_15: it was not finished: it has no STABLE" in said for said in messages)


# Bad input


def test_import_refuses_a_damaged_checkpoint_and_leaves_no_run(tmp_path):
    home = trl_output(tmp_path / "out")
    weights = home / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(NpoError, match=r"checkpoint-2.*cannot be read"):
        list(importing(tmp_path / "new" / "deep" / "run", home))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_import_of_a_folder_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NpoError, match="no checkpoint-N, global_step_N/actor, checkpoints/step_N"):
        list(importing(tmp_path / "run", tmp_path / "empty"))
    home = trl_output(tmp_path / "out")
    with pytest.raises(NpoError, match="holds no checkpoints") as refused:
        list(importing(tmp_path / "run", home / "checkpoint-2"))
    assert refused.value.hint == f"--import {home}"
    imported(tmp_path / "run", home)
    with pytest.raises(NpoError, match="belongs to the npo run"):
        list(importing(tmp_path / "again", tmp_path / "run" / "branches" / "main" / "checkpoints"))


@pytest.mark.parametrize(
    ("steps", "distance"),
    # the last one out of turn; the first one out of turn; a single one; none
    [((20, 40, 60, 67), 20), ((5, 25, 45, 65), 20), ((7,), 7), ((), 1)],
)
def test_save_interval_is_the_most_frequent_distance(steps, distance):
    assert infer_save_interval(steps) == distance


def test_import_refuses_metrics_with_a_step_above_the_maximum(tmp_path):
    home = trl_output(tmp_path / "out")
    (tmp_path / "log.jsonl").write_text('{"step": 1e15, "reward": 1.0, "entropy": 1.0}\n')
    with pytest.raises(NpoError, match="the maximum is 999,999"):
        list(importing(tmp_path / "run", home, metrics=tmp_path / "log.jsonl"))


def test_costs_of_an_imported_run_without_entropies_are_shown(tmp_path):
    home = hf_folder(tmp_path / "out" / "checkpoint-2").parent
    imported(tmp_path / "run", home, base=True)
    list(evaluate_run(tmp_path / "run", step=2, every_step=False, branch=None, overrides=()))
    point, *_ = show_run(tmp_path / "run", "costs", branch=None, step=None, prompt_id=None, limit=None)
    assert (point.step, point.entropy, point.total_steps) == (2, None, 2)


def test_import_never_opens_pickled_weights(tmp_path):
    folder = hf_folder(tmp_path / "out" / "checkpoint-1")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(NpoError, match="a pickle may run code"):
        list(importing(tmp_path / "run", tmp_path / "out"))


def test_import_removes_the_rest_of_a_killed_import_but_not_of_a_running_one(tmp_path):
    hidden = tmp_path / ".run.unfinished"
    trl_output(tmp_path / "out")
    with atomic_directory(tmp_path / "run") as building:
        assert building == hidden
        with pytest.raises(NpoError, match="another npo process is writing"):
            list(importing(tmp_path / "run", tmp_path / "out"))
        assert hidden.exists()
        building.joinpath("file").write_text("whole")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]
    shutil.rmtree(tmp_path / "run")
    (hidden / "branches").mkdir(parents=True)  # of a killed one
    assert [entry.step for entry in imported(tmp_path / "run", tmp_path / "out")[0]] == [2, 4]
    assert not hidden.exists()
