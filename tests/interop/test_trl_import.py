"""Folders that TRL itself wrote: its GRPO trainers run here for two steps, with and without adapters."""

import queue
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from npo_cli.errors import NpoError
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
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


class RecordedRollouts:
    """The worker and the weight transfer of AsyncGRPO without a vLLM server: rollouts of fixed tokens."""

    def __init__(self, tokenizer) -> None:
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        self.prompt_ids, self.response_ids = tokenizer("12+34=").input_ids, tokenizer("64").input_ids

    def start(self) -> None:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        prompt, response = len(self.prompt_ids), len(self.response_ids)
        for number in range(16):
            sample = RolloutSample(
                **{"prompt": "12+34=", "completion": "64", "group_id": number // 4, "model_version": 0},
                input_ids=torch.tensor([*self.prompt_ids, *self.response_ids]),
                completion_mask=torch.tensor([0] * prompt + [1] * response),
                old_log_probs=torch.tensor([0.0] * prompt + [-0.5] * response),
                **{"advantage": 1.0 if number % 2 else -1.0, "metrics": {"reward": float(number % 2)}},
            )
            self.rollout_buffer.put(sample)

    def send_weights(self, named_tensors) -> None:
        assert len(list(named_tensors)) > 30

    def __getattr__(self, name: str):
        return lambda *_: None


def train_with_async_grpo(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps of TRL's AsyncGRPO; its attention kernel, which needs a GPU, is replaced by a sum."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    kernel = SimpleNamespace(flash_attn_varlen_func=lambda query, key, value, *_, **__: query + value)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernel)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    settings = AsyncGRPOConfig(
        output_dir=str(out),
        **{"max_steps": 2, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none"},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_generations": 4},
        **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "token_budget": 0},
    )
    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE_FOLDER)
    stub = RecordedRollouts(tokenizer)
    AsyncGRPOTrainer(
        model=str(MICRO_BASE_FOLDER),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "12+34="}] * 8),
        processing_class=tokenizer,
        **{"rollout_worker": stub, "weight_transfer": stub},
    ).train()
    return out


def test_import_of_a_real_async_grpo_run(tmp_path, monkeypatch):
    entries, _ = imported(tmp_path / "run", train_with_async_grpo(tmp_path / "out", monkeypatch))
    assert [(entry.step, entry.reward) for entry in entries] == [(1, 0.5), (2, 0.5)]
    rows = list(read_metrics(open_run(tmp_path / "run"), "main"))
    assert all(row["entropy"] > 0 and "sample/staleness_mean" in row for row in rows)
    policies = [open_session_at(tmp_path / "run", step).policy for step in (1, 2)]
    assert policies[0].digest != policies[1].digest


@pytest.mark.slow
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
