"""What is handed to other programs is opened by them: transformers, peft, pyarrow, datasets, TRL's own formats."""

import shutil

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import is_conversational

from npo_cli.errors import NpoError
from npo_cli.interop.export import export_checkpoint, export_guide
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from tests.helpers.other_trainers import trl_output
from tests.helpers.runs import LORA, copy_run, resume, sample, train
from tests.interop.test_import_run import imported


@pytest.fixture(scope="module")
def guided(scout, tmp_path_factory):
    """A copy of the tiny run, whose guide answers are given to the easy prompts as well."""
    root = copy_run(scout, tmp_path_factory.mktemp("export") / "run")
    sample(root, "guide.inject.max_accuracy=1.0", "guide.cache.keep=all", name="all")
    return root


def rows_of(root, out, **options):
    list(export_guide(root, "all", out=out, **{"form": "trl"} | options))
    return pyarrow.parquet.read_table(out).to_pylist()


def test_exported_guide_has_every_response_with_tokens_and_logprobs(guided, tmp_path):
    rows = rows_of(guided, tmp_path / "g.parquet")
    _, kept = load_guide(open_run(guided), "all")
    assert len(rows) == len(kept) == 8
    for row in rows:
        (trajectory,) = kept[row["prompt_id"]].rollouts
        assert (tuple(row["response_ids"]), tuple(row["logps"])) == (
            trajectory.response_ids,
            trajectory.behavior_logps,
        )
        assert (row["reward"], row["reward_model"]) == (
            float(trajectory.verdict == "correct"),
            {"style": "rule", "ground_truth": row["answer"]},
        )
        # plain prompts stay text for TRL
        assert isinstance(row["prompt"], str) and row["completion"] == trajectory.text == row["response"]
        assert not is_conversational(row)


def test_exported_guide_for_verl_has_chat_prompts_and_a_warning(guided, tmp_path):
    records = list(export_guide(guided, "all", out=tmp_path / "v.parquet", form="verl"))
    assert records[-1].level == "warning"
    rows = pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pylist()
    assert is_conversational(rows[0])
    assert [turn["role"] for turn in rows[0]["prompt"] + rows[0]["completion"]] == ["user", "assistant"]
    assert [row["extra_info"]["index"] for row in rows] == list(range(8))
    assert {row["data_source"] for row in rows} == {"micro"}


def test_exported_guide_is_read_back_as_a_trace_file(guided, tmp_path):
    rows = rows_of(guided, tmp_path / "g.parquet")
    settings = ("guide.inject.max_accuracy=1.0", "guide.cache.keep=all")
    sample(guided, *settings, source=f"file:{tmp_path / 'g.parquet'}", steps=2, name="back")
    _, kept = load_guide(open_run(guided), "back")
    assert {name: some.rollouts[0].response_ids for name, some in kept.items()} == {
        row["prompt_id"]: tuple(row["response_ids"]) for row in rows
    }


def test_exported_checkpoint_opens_in_transformers_with_a_model_card(guided, tmp_path):
    resume(guided, at=2, guide="near", new_branch="late")
    list(export_checkpoint(guided, step=4, branch="late", out=tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    source = guided / "branches" / "late" / "checkpoints" / "step_000004"
    there = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in model.state_dict().items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"npo.json", "training_state"} & names and "README.md" in names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- `main`, steps 0 to 2: " in card and "with responses of a guide (step 4) injected until step 4\n" in card
    assert "## Held-out accuracy\n\nNot measured.\n" in card
    assert "train.prompts_per_step: 4" in card
    assert str(tmp_path) not in card


def test_exported_adapters_open_in_peft(tmp_path):
    train(tmp_path / "run", *LORA, "train.num_steps=2")
    list(export_checkpoint(tmp_path / "run", step=2, branch=None, out=tmp_path / "out"))
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(MICRO_BASE_FOLDER)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())


def test_model_card_of_an_import_lists_no_settings(tmp_path):
    imported(tmp_path / "run", trl_output(tmp_path / "home"))
    list(export_checkpoint(tmp_path / "run", step=4, branch=None, out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by another trainer (transformers or TRL), imported; its settings are not recorded" in card
    assert "## Settings" not in card


def test_export_replaces_no_file_and_refuses_damaged_checkpoints(guided, tmp_path):
    (tmp_path / "g.parquet").touch()
    with pytest.raises(NpoError, match="exists"):
        rows_of(guided, tmp_path / "g.parquet")
    with pytest.raises(NpoError, match="must end in"):
        rows_of(guided, tmp_path / "g.csv")
    root = copy_run(guided, tmp_path / "run")
    weights = root / "branches" / "main" / "checkpoints" / "step_000004" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(NpoError, match="does not have the sha256"):
        list(export_checkpoint(root, step=4, branch="main", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(root)
