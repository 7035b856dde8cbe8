"""Tiny models built on the spot."""

from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from npo_cli.config.recipe import ModelSettings
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER

SMALL = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "eos_token_id": 15,
    "pad_token_id": 16,
    "bos_token_id": None,
}


def qwen(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=tied)).eval()


def gemma(*, cap: float | None, seed: int = 0) -> PreTrainedModel:
    """A model whose logits are `cap * tanh(logits / cap)`."""
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=cap, sliding_window=8)).eval()


def save_model(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    """The model's folder, with the micro tokenizer."""
    model.save_pretrained(folder, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MICRO_BASE_FOLDER / name).read_bytes())
    return folder


def load_saved_policy(folder: Path, **settings: str) -> Policy:
    return load_policy(ModelSettings(path=str(folder), threads=1, **settings))
