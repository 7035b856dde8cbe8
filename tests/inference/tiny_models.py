"""Tiny models of random weights, of several architectures, as an engine sees them."""

from collections.abc import Sequence

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from npo_cli.config.engine import EngineSettings
from npo_cli.inference.base import LogprobRequest, ModelHandle, Sample, SampleRequest
from npo_cli.inference.transformers_engine import TransformersEngine
from npo_cli.policy.model import load_tokenizer
from npo_cli.seeds import derive_seed

EOS = 39
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def qwen() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def deepseek() -> PreTrainedModel:
    """Keys and values of different sizes, and experts."""
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    sizes = SIZES | ranks | experts | {"num_key_value_heads": 2, "moe_intermediate_size": 8, "head_dim": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, first_k_dense_replace=1))


def falcon() -> PreTrainedModel:
    """No position ids: a bias by the distance of two tokens, which the model makes from a mask per token."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return FalconForCausalLM(FalconConfig(**sizes, alibi=True, bos_token_id=EOS, eos_token_id=EOS))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))


def gemma() -> PreTrainedModel:
    """Sliding and full attention in turn, capped attention logits."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=8, attn_implementation="eager"))


def lfm() -> PreTrainedModel:
    """A convolution, then attention."""
    return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))


def qwen_next() -> PreTrainedModel:
    """Linear attention, then full attention."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "moe_intermediate_size": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 8}
    kinds = ["linear_attention", "full_attention"]
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **heads, **sizes, **experts, layer_types=kinds))


IN_PLACE = (qwen, deepseek, falcon)
GROWING = (mistral, gemma, lfm, qwen_next)


def make_handle(build, *, eos_ids: tuple[int, ...] = (EOS,)) -> ModelHandle:
    torch.manual_seed(0)
    return ModelHandle(
        model=build().eval(),
        # 17 tokens: ids above are left out of texts
        tokenizer=load_tokenizer("micro-base"),
        eos_ids=eos_ids,
        pad_id=0,
        max_model_len=512,
        dtype=torch.float32,
    )


def open_engine(build, *, max_rows: int = 512, eos_ids: tuple[int, ...] = (EOS,)) -> TransformersEngine:
    return TransformersEngine(EngineSettings(max_num_seqs=max_rows), make_handle(build, eos_ids=eos_ids))


def make_requests(lengths: Sequence[int] = (1, 3, 12, 30), *, num_slots: int = 6) -> list[SampleRequest]:
    """Prompts of these lengths."""
    return [
        SampleRequest(
            prompt_id=f"{place}", prompt_ids=tuple(range(1, 1 + length)), slot=slot, seed=derive_seed(place, slot)
        )
        for place, length in enumerate(lengths)
        for slot in range(num_slots)
    ]


def compute_logps(engine: TransformersEngine, requests: Sequence[SampleRequest], samples: Sequence[Sample]):
    """Of each response, by a plain pass."""
    return engine.compute_logps(
        [
            LogprobRequest(prompt_ids=request.prompt_ids, response_ids=sample.response_ids, images=request.images)
            for request, sample in zip(requests, samples, strict=True)
        ]
    )
