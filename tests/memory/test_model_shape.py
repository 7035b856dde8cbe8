"""What a model is made of, counted without a weight: held against the real model and a real pass."""

import pytest
import torch

from npo_cli.config.recipe import LoraSettings, ModelSettings
from npo_cli.errors import NpoError
from npo_cli.memory.model_shape import TRACE_TOKENS as TOKENS
from npo_cli.memory.model_shape import adafactor_numel, model_shape
from npo_cli.policy.model import Policy, load_policy


def saved_by_a_real_pass(policy: Policy) -> int:
    """Bytes of the storages behind what autograd saves while a response of 250 tokens is scored, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    ids = torch.zeros((1, TOKENS), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.model.base_model(input_ids=ids, use_cache=False)
    return sum(found.values())


def test_model_shape_equals_the_real_model():
    policy = load_policy(ModelSettings(threads=1))
    shape = model_shape(ModelSettings(threads=1))
    assert shape.num_params == sum(parameter.numel() for parameter in policy.model.parameters())
    assert shape.activation_bytes * TOKENS == pytest.approx(saved_by_a_real_pass(policy), rel=0.02)
    assert (shape.vocab_size, shape.hidden_size, shape.vision_activation_bytes) == (17, 96, 0.0)
    # 3 layers x keys and values x 2 heads x 48
    text = policy.model.config
    assert shape.kv_cache_floats == 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def test_model_shape_with_gradient_checkpointing_keeps_layer_inputs():
    shape = model_shape(ModelSettings(threads=1))
    # the input of each layer and the last norm's, in float32, and a little beside them
    layers = load_policy(ModelSettings(threads=1)).model.config.num_hidden_layers
    assert shape.checkpointed_activation_bytes == pytest.approx((layers + 1) * 96 * 4, rel=0.4)
    assert shape.layer_activation_bytes * layers == pytest.approx(shape.activation_bytes)


def test_model_shape_in_mixed_precision_saves_less():
    full, mixed = (model_shape(ModelSettings(compute_dtype=kind)) for kind in (None, "bfloat16"))
    assert 0.5 * full.activation_bytes < mixed.activation_bytes < full.activation_bytes
    assert full.num_params == mixed.num_params


def test_model_shape_counts_adapters_like_peft():
    settings = ModelSettings(threads=1, lora=LoraSettings(rank=4))
    policy = load_policy(settings)
    assert model_shape(settings).num_lora_params == sum(tensor.numel() for tensor in policy.adapter_weights.values())


def test_adafactor_state_is_a_row_and_a_column():
    # 3 x (5 + 7) of three matrices; a vector as it is
    assert (adafactor_numel((5, 7)), adafactor_numel((3, 5, 7)), adafactor_numel((9,))) == (12, 36, 9)


def test_model_shape_needs_only_a_config(tmp_path):
    policy = load_policy(ModelSettings(threads=1))
    policy.model.config.to_json_file(tmp_path / "config.json")
    path = str(tmp_path / "config.json")
    assert model_shape(ModelSettings(path=path)).num_params == model_shape(ModelSettings()).num_params
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(NpoError, match="no model config could be read"):
        model_shape(ModelSettings(path=str(tmp_path / "other.json")))
