"""The arithmetic of memory, on a model small enough to do it by hand."""

from npo_cli.config.loading import recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.memory.footprint import engine_needs, gpu_needs, host_needs
from npo_cli.types.memory import Allocation, Hardware, ModelShape

SHAPE = ModelShape(
    num_params=1000,
    num_lora_params=0,
    adafactor_floats=80,
    largest_block_params=300,
    root_params=100,
    hidden_size=10,
    vocab_size=50,
    kv_cache_floats=40,
    activation_bytes=200.0,
    checkpointed_activation_bytes=20.0,
    layer_activation_bytes=60.0,
    vision_activation_bytes=0.0,
)
GPU = Hardware(num_gpus=1, gpu_bytes=10**6)


def recipe(**sections: dict) -> Recipe:
    base = {
        "task": {"max_prompt_tokens": 60},
        "sampling": {"max_new_tokens": 40},
        "train": {"micro_batch_tokens": 500, "logit_chunk_tokens": 70, "prompts_per_step": 4, "group_size": 8},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}}
    return recipe_from_dict(merged)


def by_name(needs: object) -> dict[str, int]:
    """Without the guess and the tenth that is put beside it."""
    counted = [
        need
        for need in needs
        if isinstance(need, Allocation) and need.formula not in ("a guess", "a tenth of the rest")
    ]
    return {need.label: need.num_bytes for need in counted}


def test_one_gpu_in_float32():
    assert by_name(gpu_needs(recipe(), SHAPE, GPU)) == {
        "weights": 1000 * 4,
        "gradients": 1000 * 4,
        "AdamW's moments": 2 * 1000 * 4,
        "activations": 500 * 200,
        # 4 float32 rows and the head's own
        "logits of a chunk": 70 * 50 * (4 * 4 + 4),
        "a guide's part of the gradient": 1000 * 4,
        # 32 rollouts of 60 + 40 tokens
        "KV cache": 32 * 100 * 40 * 4,
        "logits": 32 * 50 * (6 * 4 + 4),
    }


def test_four_gpus_in_mixed_precision_with_checkpointing_and_a_kl_term():
    found = recipe(
        model={"compute_dtype": "bfloat16", "gradient_checkpointing": True},
        loss={"kl_coef": 0.1},
        engine={"max_num_seqs": 5},
    )
    assert by_name(gpu_needs(found, SHAPE, Hardware(num_gpus=4, gpu_bytes=10**6))) == {
        "weights": 1000,
        "gradients": 1000,
        "AdamW's moments": 2000,
        "frozen base of the KL term": 1000,
        "activations": 500 * 80,
        "logits of a chunk": 70 * 50 * 18,
        # embedding and head, and two blocks: in bfloat16, and their gradients in float32
        "gathered blocks": (100 + 600) * 6,
        "a guide's part of the gradient": 1000,
        # 8 rollouts a GPU, of which 5 side by side
        "KV cache": 5 * 100 * 40 * 2,
        "logits": 5 * 50 * 26,
        "whole weights": 2000,
    }


def test_a_row_longer_than_a_micro_batch_is_one_of_its_own():
    needs = by_name(gpu_needs(recipe(train={"micro_batch_tokens": 10}), SHAPE, GPU))
    assert needs["activations"] == 100 * 200


def test_adapters_are_trained_in_float32_beside_a_bfloat16_base():
    shape = ModelShape(**{name: getattr(SHAPE, name) for name in SHAPE.__slots__} | {"num_lora_params": 30})
    found = recipe(model={"dtype": "bfloat16", "lora": {"rank": 2}}, loss={"kl_coef": 0.1})
    needs = by_name(gpu_needs(found, shape, GPU))
    expected = {"weights": 2000, "adapters": 120, "gradients": 120, "AdamW's moments": 240}
    assert {name: needs[name] for name in expected} == expected
    assert "frozen base of the KL term" not in needs
    saving = [need.num_bytes for need in host_needs(found, shape, GPU) if need.phase == "saving"]
    assert saving == [120]


def test_adafactor_keeps_less_and_vllm_takes_its_share():
    asleep, awake = (
        recipe(
            train={"optimizer": "adafactor"},
            engine={"kind": "vllm", "vllm": {"gpu_memory_utilization": 0.5, "enable_sleep_mode": sleep}},
        )
        for sleep in (True, False)
    )
    needs = {need.label: need for need in gpu_needs(asleep, SHAPE, GPU)}
    assert needs["Adafactor's rows and columns"].num_bytes == 320
    assert (needs["vLLM"].num_bytes, needs["vLLM"].phase) == (500_000, "sampling")
    assert {need.phase for need in gpu_needs(awake, SHAPE, GPU) if need.label == "vLLM"} == {"always"}
    assert [need.num_bytes for need in host_needs(asleep, SHAPE, GPU) if need.phase == "update"] == [4000]


def test_a_server_has_gpus_of_its_own():
    found = recipe(engine={"kind": "vllm_server", "vllm": {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.9}})
    footing = Hardware(num_gpus=6, gpu_bytes=10**6)
    assert by_name(engine_needs(found, SHAPE, footing)) == {
        "weights": 2000,
        "KV cache of one response": 100 * 40 * 4 // 2,
        "what vLLM leaves alone": 100_000,
    }
    needs = by_name(gpu_needs(found, SHAPE, footing))
    # Four GPUs train: a quarter each, whole to score.
    assert (needs["weights"], needs["whole weights"], "KV cache" in needs) == (1000, 4000, False)
    assert not list(engine_needs(recipe(), SHAPE, footing))


def test_a_tenth_of_each_phase_is_put_beside_it_but_for_guesses_and_what_vllm_takes():
    found = recipe(engine={"kind": "vllm", "vllm": {"gpu_memory_utilization": 0.5, "enable_sleep_mode": True}})
    needs = [*gpu_needs(found, SHAPE, GPU)]
    beside = {need.phase: need.num_bytes for need in needs if need.label == "what is not counted"}
    # weights and moments; gradients, activations, logits and a guide's part
    assert beside == {"always": (4000 + 8000) / 10, "update": (4000 + 500 * 200 + 70 * 50 * 20 + 4000) / 10}


def test_a_policy_pushed_along_its_motion_holds_an_older_copy_or_moves_its_weights():
    logits = by_name(gpu_needs(recipe(guide={"source": "extrapolated"}), SHAPE, GPU))
    plain = by_name(gpu_needs(recipe(), SHAPE, GPU))
    # as many rows as the policy's own, of 60 + 40 tokens
    assert {name: size for name, size in logits.items() if name not in plain} == {
        "an older copy": 1000 * 4,
        "its KV cache": 32 * 100 * 40 * 4,
    }
    weights = recipe(autonpo={"extrapolate": 20}, extrapolation={"space": "weights"})
    found = by_name(gpu_needs(weights, SHAPE, GPU))
    assert {name: size for name, size in found.items() if name not in plain} == {"moved weights": 1000 * 4}
