"""Tiny policies for a real vLLM: the tied micro base, and one of its shape whose head stands apart."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from npo_cli.config.engine import EngineSettings, VllmSettings
from npo_cli.config.recipe import ModelSettings
from npo_cli.inference.base import AdapterHandle, ModelHandle, SampleRequest
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.registry import ENGINES
from npo_cli.seeds import derive_seed


def tied_policy() -> Policy:
    return load_policy(ModelSettings(threads=1))


def untied_policy(folder: Path) -> Policy:
    """The micro base with a head of its own, a little different from its embedding."""
    config = AutoConfig.from_pretrained(MICRO_BASE_FOLDER)
    config.tie_word_embeddings = False
    base = tied_policy()
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(base.model.state_dict())
    with torch.no_grad():
        head = model.lm_head.weight
        head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(3)) / 50)
    model.generation_config = base.model.generation_config
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return load_policy(ModelSettings(path=str(folder), threads=1))


def make_settings(kind: str = "vllm", **changes: Any) -> EngineSettings:
    """Settings for tests on a CPU."""
    vllm = VllmSettings(**{"max_loras": 4, "start_timeout": 240.0, "timeout": 120.0} | changes)
    return EngineSettings(kind=kind, max_num_seqs=64, vllm=vllm)


def make_handle(policy: Policy, *, max_model_len: int = 64, adapters: AdapterHandle | None = None) -> ModelHandle:
    """The policy as an engine sees it."""
    return ModelHandle(
        model=policy.model,
        tokenizer=policy.tokenizer,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        max_model_len=max_model_len,
        dtype=policy.compute_dtype,
        adapters=adapters,
        vision=policy.vision,
    )


def make_engine(kind: str, policy: Policy, **options: Any) -> Any:
    """An engine of that kind for the policy, started."""
    return ENGINES.get(kind)(make_settings(kind), make_handle(policy, **options))


def make_requests(policy: Policy, *texts: str, num_slots: int = 8) -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt_id=text,
            prompt_ids=tuple(policy.tokenizer(text).input_ids),
            slot=slot,
            seed=derive_seed(0, text, slot),
        )
        for text in texts
        for slot in range(num_slots)
    ]


@torch.no_grad()
def perturb_weights(policy: Policy, *, by: float, seed: int = 0) -> None:
    """Another policy: every weight by a random step of that relative size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.abs().mean() * by)
