"""A folder that TRL itself wrote: its GRPO trainer runs here for two steps, with and without adapters."""

from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.policy.model import MICRO_BASE_FOLDER
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.metrics import read_metrics
from tests.helpers.runs import open_session_at, resume, sample
from tests.interop.test_import_run import imported

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def train_with_trl(out: Path, **lora: object) -> Path:
    """Two steps of TRL's GRPO on sums, a checkpoint after each."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 14) for b in range(20, 24)]
    settings = GRPOConfig(
        output_dir=str(out),
        **{"max_steps": 2, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none"},
        **{"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12},
        **{"use_cpu": True, "bf16": False, "disable_tqdm": True},
    )
    trainer = GRPOTrainer(
        model=str(MICRO_BASE_FOLDER),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(MICRO_BASE_FOLDER),
        peft_config=LoraConfig(**lora) if lora else None,
    )
    trainer.train()
    return out


def test_import_of_a_real_trl_run(tmp_path):
    entries, _ = imported(tmp_path / "run", train_with_trl(tmp_path / "out"))
    assert [entry.step for entry in entries] == [1, 2]
    rows = list(read_metrics(open_run(tmp_path / "run"), "main"))
    assert [entry.reward for entry in entries] == [row["reward"] for row in rows]
    assert all(row["entropy"] > 0 for row in rows)


def test_import_of_real_trl_adapters(tmp_path):
    entries, _ = imported(tmp_path / "run", train_with_trl(tmp_path / "out", **LORA), base=True)
    assert [entry.step for entry in entries] == [0, 1, 2]
    assert open_run(tmp_path / "run").read_recipe()["model"]["lora"]["rank"] == 4
    policies = [open_session_at(tmp_path / "run", step).policy for step in (0, 2)]
    assert policies[0].digest != policies[1].digest
    assert (find_checkpoint(open_run(tmp_path / "run"), "main", 2).path / "npo_base.json").is_file()
    assert sample(tmp_path / "run", "guide.inject.max_accuracy=1.0", at=1, source="2").complete
    assert [one.step for one in resume(tmp_path / "run", "train.num_steps=3", at=1, guide="near", fresh=True)] == [2, 3]


def test_import_refuses_unsupported_adapters(tmp_path):
    home = train_with_trl(tmp_path / "out", **LORA, use_rslora=True)
    with pytest.raises(NpoError, match="adapters with use_rslora True are not supported"):
        imported(tmp_path / "run", home)
    assert not (tmp_path / "run").exists()
