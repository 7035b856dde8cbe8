"""Runs made from weights in shards, which two ranks of FSDP2 saved as prime-rl, accelerate (under TRL) and verl do."""

import json
import os
import pickle
import shutil
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from npo_cli.errors import NpoError
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from tests.helpers.runs import file_digests, open_session_at, resume, sample
from tests.helpers.torchrun import run
from tests.interop.test_import_run import imported, importing


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders prime-rl, trl and verl with steps 1 and 2, and their whole tensors."""
    home = tmp_path_factory.mktemp("shards")
    run(str(home), log=home / "log", module="tests.helpers.shard_worker")
    return home


def checkpoint_weights(root: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(open_run(root), "main", step).path / "model.safetensors")


@pytest.mark.parametrize("trainer", ["prime-rl", "trl", "verl"])
def test_import_of_shards_has_the_whole_tensors(outputs, tmp_path, trainer):
    before = file_digests(outputs / trainer)
    entries, _ = imported(tmp_path / "run", outputs / trainer)
    assert [entry.step for entry in entries] == [1, 2]
    for step in (1, 2):
        whole, mine = load_file(outputs / f"whole-{step}.safetensors"), checkpoint_weights(tmp_path / "run", step)
        # a tied head is saved once
        assert whole.keys() - mine.keys() <= {"lm_head.weight"}
        assert all(torch.equal(mine[name], whole[name]) for name in mine)
    assert not torch.equal(mine["model.norm.weight"], checkpoint_weights(tmp_path / "run", 1)["model.norm.weight"])
    assert file_digests(outputs / trainer) == before


def test_import_of_a_dcp_run_reads_metrics_and_is_replayed(outputs, tmp_path):
    home = Path(shutil.copytree(outputs / "prime-rl", tmp_path / "out"))
    rows = [{"step": step, "reward/all/mean": step / 4, "entropy/mean": 1.0} for step in (1, 2)]
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries, messages = imported(tmp_path / "run", home, base=True)
    assert [(entry.step, entry.reward) for entry in entries] == [(0, None), (1, 0.25), (2, 0.5)]
    assert any("no config and tokenizer, those of micro-base are used" in said for said in messages)
    assert sample(tmp_path / "run", "guide.inject.max_accuracy=1.0", at=1, source="2").complete
    assert [one.step for one in resume(tmp_path / "run", "train.num_steps=2", at=1, guide="near", fresh=True)] == [2]


def test_import_of_verl_shards_takes_config_and_tokenizer_from_beside_them(outputs, tmp_path):
    imported(tmp_path / "run", outputs / "verl")
    path = find_checkpoint(open_run(tmp_path / "run"), "main", 2).path
    assert AutoConfig.from_pretrained(path).max_position_embeddings == 100
    assert AutoConfig.from_pretrained(MICRO_BASE_FOLDER).max_position_embeddings != 100
    assert open_session_at(tmp_path / "run", 2).policy.max_tokens == 100


def test_import_of_verl_skips_a_step_without_the_files_of_all_ranks(outputs, tmp_path):
    home = Path(shutil.copytree(outputs / "verl", tmp_path / "out"))
    (home / "global_step_1" / "actor" / "model_world_size_2_rank_1.pt").unlink()
    entries, messages = imported(tmp_path / "run", home)
    assert [entry.step for entry in entries] == [2]
    assert any("files of some ranks are missing" in said for said in messages)


def test_import_of_shards_of_another_model_names_the_setting(outputs, tmp_path):
    base = Path(shutil.copytree(MICRO_BASE_FOLDER, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    shorter = {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (base / "config.json").write_text(json.dumps(config | shorter))
    with pytest.raises(NpoError, match=r"tensor extra: model.layers.*compared with model.path=.*base") as refused:
        list(importing(tmp_path / "run", outputs / "prime-rl", f"model.path={base}"))
    assert refused.value.hint.startswith("model.path=")
    assert not (tmp_path / "run").exists()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_import_of_shards_runs_nothing_in_their_pickles(outputs, tmp_path):
    marks = [tmp_path / "dcp-ran", tmp_path / "verl-ran"]
    dcp, verl = (Path(shutil.copytree(outputs / name, tmp_path / name)) for name in ("prime-rl", "verl"))
    (dcp / "checkpoints" / "step_2" / "trainer" / ".metadata").write_bytes(pickle.dumps(Payload(marks[0])))
    torch.save({"a": Payload(marks[1])}, verl / "global_step_2" / "actor" / "model_world_size_2_rank_0.pt")
    with pytest.raises(NpoError, match=r"step_2/trainer cannot be read: posix.mkdir is no part of DCP's metadata"):
        list(importing(tmp_path / "run", dcp))
    with pytest.raises(NpoError, match="other ranks' cannot be read") as refused:
        list(importing(tmp_path / "run", verl))
    assert "verl.model_merger" in refused.value.hint
    assert not any(mark.exists() for mark in marks)


class EnumByGetattr(pickle.Pickler):
    """Writes members of enumerations as Python up to 3.11.3 does."""

    def reducer_override(self, obj: object) -> object:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_import_of_dcp_shards_of_an_older_python(outputs, tmp_path):
    home = Path(shutil.copytree(outputs / "prime-rl", tmp_path / "out"))
    for step in (1, 2):
        path = home / "checkpoints" / f"step_{step}" / "trainer" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        with path.open("wb") as file:
            EnumByGetattr(file).dump(metadata)
        assert b"getattr" in path.read_bytes()
    entries, _ = imported(tmp_path / "run", home)
    assert [entry.step for entry in entries] == [1, 2]


def test_import_of_dcp_shards_calls_getattr_for_enumerations_only(outputs, tmp_path):
    home = Path(shutil.copytree(outputs / "prime-rl", tmp_path / "out"))
    call = type("Call", (), {"__reduce__": lambda self: (getattr, (torch.Size, "numel"))})
    (home / "checkpoints" / "step_2" / "trainer" / ".metadata").write_bytes(pickle.dumps(call()))
    with pytest.raises(NpoError, match=r"getattr\(..., 'numel'\) is no part of DCP's metadata"):
        list(importing(tmp_path / "run", home))


def test_import_of_damaged_dcp_shards_leaves_no_run(outputs, tmp_path):
    home = Path(shutil.copytree(outputs / "prime-rl", tmp_path / "out"))
    shard = home / "checkpoints" / "step_1" / "trainer" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(NpoError, match="step_1/trainer cannot be read"):
        list(importing(tmp_path / "run", home))
    assert not (tmp_path / "run").exists()
