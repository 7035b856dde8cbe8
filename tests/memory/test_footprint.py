"""The arithmetic of memory and disk space, on a model small enough to do it by hand; and beside a real run."""

from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe, recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.memory.footprint import estimate_footprint
from npo_cli.memory.model_shape import model_shape
from npo_cli.storage.disk_space import count_kept_checkpoints
from npo_cli.types.memory import Allocation, Hardware, ModelShape
from tests.helpers.runs import tiny_recipe, train

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


def estimate(
    recipe: Recipe, location: str, *, shape: ModelShape = SHAPE, hardware: Hardware = GPU, autonpo: bool = False
) -> dict[str, int]:
    """Bytes by label, without the assumed sizes and the tenth that is added."""
    return {
        each.label: each.num_bytes
        for each in estimate_footprint(recipe, shape, hardware, autonpo=autonpo)
        if each.location == location and each.label not in ("CUDA and NCCL", "uncounted", "processes")
    }


def list_allocations(recipe: Recipe, location: str) -> list[Allocation]:
    return [each for each in estimate_footprint(recipe, SHAPE, GPU) if each.location == location]


def test_gpu_memory_in_float32():
    assert estimate(recipe(), "gpu") == {
        "weights": 1000 * 4,
        "gradients": 1000 * 4,
        "AdamW moments": 2 * 1000 * 4,
        "activations": 500 * 200,
        # 4 float32 rows and the head's own
        "logits of a chunk": 70 * 50 * (4 * 4 + 4),
        "guide's part of the gradient": 1000 * 4,
        # 32 rollouts of 60 + 40 tokens
        "KV cache": 32 * 100 * 40 * 4,
        # the head's own, and 3 float32 rows to choose a token
        "logits": 32 * 50 * (4 + 3 * 4),
    }


def test_gpu_memory_of_four_gpus_in_mixed_precision_with_checkpointing_and_a_kl_term():
    found = recipe(
        model={"compute_dtype": "bfloat16", "gradient_checkpointing": True},
        loss={"kl_coef": 0.1},
        engine={"max_num_seqs": 5},
    )
    assert estimate(found, "gpu", hardware=Hardware(num_gpus=4, gpu_bytes=10**6)) == {
        "weights": 1000,
        "gradients": 1000,
        "AdamW moments": 2000,
        "frozen base of the KL term": 1000,
        "activations": 500 * 80,
        "logits of a chunk": 70 * 50 * 18,
        # embedding and head, and two blocks: in bfloat16, and their gradients in float32
        "gathered blocks": (100 + 600) * 6,
        "guide's part of the gradient": 1000,
        # 8 rollouts a GPU, of which 5 side by side
        "KV cache": 5 * 100 * 40 * 2,
        "logits": 5 * 50 * (2 + 3 * 4),
        "whole weights": 2000,
    }


def test_tokens_of_a_large_vocabulary_are_chosen_a_chunk_of_rows_at_a_time():
    shape = ModelShape(**{name: getattr(SHAPE, name) for name in SHAPE.__slots__} | {"vocab_size": 10**6})
    needs = estimate(recipe(), "gpu", shape=shape)
    assert needs["logits"] == 32 * 10**6 * 4 + 2**23 * 3 * 4


def test_activations_cover_a_row_longer_than_a_micro_batch():
    needs = estimate(recipe(train={"micro_batch_tokens": 10}), "gpu")
    assert needs["activations"] == 100 * 200


def test_lora_adapters_are_float32_with_a_bfloat16_base():
    shape = ModelShape(**{name: getattr(SHAPE, name) for name in SHAPE.__slots__} | {"num_lora_params": 30})
    found = recipe(model={"dtype": "bfloat16", "lora": {"rank": 2}}, loss={"kl_coef": 0.1})
    needs = estimate(found, "gpu", shape=shape)
    expected = {"weights": 2000, "adapters": 120, "gradients": 120, "AdamW moments": 240}
    assert {name: needs[name] for name in expected} == expected
    assert "frozen base of the KL term" not in needs
    assert estimate(found, "host", shape=shape)["copy of weights and moments"] == 120 + 240
    between = recipe(model={"dtype": "bfloat16", "lora": {"rank": 2}}, train={"save_in_background": False})
    assert estimate(between, "host", shape=shape)["gathered weights"] == 120


def test_adafactor_state_and_vllm_in_sleep_mode():
    asleep, awake = (
        recipe(
            train={"optimizer": "adafactor"},
            engine={"kind": "vllm", "vllm": {"gpu_memory_utilization": 0.5, "enable_sleep_mode": sleep}},
        )
        for sleep in (True, False)
    )
    needs = {each.label: each for each in list_allocations(asleep, "gpu")}
    assert needs["Adafactor rows and columns"].num_bytes == 320
    assert (needs["vLLM"].num_bytes, needs["vLLM"].phase) == (500_000, "sampling")
    assert {each.phase for each in list_allocations(awake, "gpu") if each.label == "vLLM"} == {"always"}
    assert estimate(asleep, "host")["vLLM's weights in sleep mode"] == 4000


def test_vllm_server_has_its_own_gpus():
    found = recipe(engine={"kind": "vllm_server", "vllm": {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.9}})
    hardware = Hardware(num_gpus=6, gpu_bytes=10**6)
    assert estimate(found, "engine gpu", hardware=hardware) == {
        "weights": 2000,
        "KV cache of one response": 100 * 40 * 4 // 2,
        "outside vLLM": 100_000,
    }
    needs = estimate(found, "gpu", hardware=hardware)
    # Four GPUs train: a quarter each, whole to score.
    assert (needs["weights"], needs["whole weights"], "KV cache" in needs) == (1000, 4000, False)
    assert estimate(recipe(), "engine gpu") == {}


def test_uncounted_memory_is_a_tenth_of_each_phase_without_vllm():
    found = recipe(engine={"kind": "vllm", "vllm": {"gpu_memory_utilization": 0.5, "enable_sleep_mode": True}})
    needs = list_allocations(found, "gpu")
    beside = {need.phase: need.num_bytes for need in needs if need.label == "uncounted"}
    # weights and moments; gradients, activations, logits and a guide's part
    assert beside == {"always": (4000 + 8000) / 10, "update": (4000 + 500 * 200 + 70 * 50 * 20 + 4000) / 10}


def test_extrapolated_guide_holds_an_older_checkpoint_or_extrapolated_weights():
    logits = estimate(recipe(guide={"source": "extrapolated"}), "gpu")
    plain = estimate(recipe(), "gpu")
    # as many rows as the policy's own, of 60 + 40 tokens
    assert {name: size for name, size in logits.items() if name not in plain} == {
        "older checkpoint": 1000 * 4,
        "KV cache of the older checkpoint": 32 * 100 * 40 * 4,
    }
    found = estimate(recipe(guide={"source": "extrapolated"}, extrapolation={"space": "weights"}), "gpu")
    assert {name: size for name, size in found.items() if name not in plain} == {"extrapolated weights": 1000 * 4}


# Disk space


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        # steps 0, 10, ..., 100 are 11
        ((), (11, 0)),
        (("train.keep_full_checkpoints=2",), (3, 8)),
        (("train.keep_full_checkpoints=2", "train.keep_weights_only=5"), (3, 5)),
        (("train.keep_full_checkpoints=50",), (11, 0)),
    ],
)
def test_kept_checkpoints_follow_the_retention_settings(quotas, expected):
    assert count_kept_checkpoints(load_recipe("micro", ["train.save_every=10", *quotas]), 100) == expected


def test_disk_space_of_autonpo_counts_a_branch_per_replay():
    settings = [
        "train.num_steps=100",
        "train.save_every=10",
        "autonpo.rollback.distances=[20,40]",
        "autonpo.max_interventions=2",
        "guide.cache.samples_per_prompt=8",
    ]
    recipe = load_recipe("micro", [*settings, "train.prompts_per_step=4", "train.group_size=4"])
    alone, watched = (estimate(recipe, "disk", autonpo=on) for on in (False, True))
    # weights 4000, optimizer state 8000; step 0 has no optimizer state
    assert alone["checkpoints of the run's branch"] == 11 * 12_000 - 8000
    # 2 x 40 steps: 8 checkpoints and step 0
    assert watched["checkpoints of up to 2 replays"] == 9 * 12_000 - 8000
    # 180 steps instead of 100; three caches instead of one
    assert watched["logs"] == pytest.approx(1.8 * alone["logs"])
    assert watched["guide caches"] == 3 * alone["guide caches"]


def test_disk_space_is_what_a_real_run_takes(tmp_path):
    settings = ("train.num_steps=12", "train.prompts_per_step=8", "task.pool_size=64")
    train(tmp_path / "run", *settings)
    recipe = tiny_recipe(*settings)
    planned = estimate(recipe, "disk", shape=model_shape(recipe.model))
    checkpoints = folder_size(tmp_path / "run" / "branches" / "main" / "checkpoints")
    logs = folder_size(tmp_path / "run") - checkpoints
    # 7 full checkpoints, the first without optimizer state; beside the tensors a few kB of JSON each
    assert planned["checkpoints of the run's branch"] == pytest.approx(checkpoints, rel=0.03)
    # responses may end before the limit
    assert logs == pytest.approx(planned["logs"], rel=0.25)


def test_disk_space_of_a_server_holds_the_model_and_one_weight_sync():
    hardware = Hardware(num_gpus=2, gpu_bytes=10**6)
    server = estimate(load_recipe("micro", ["engine.kind=vllm_server"]), "disk", hardware=hardware)
    assert server["weights for the server"] == 4000 + 4000
    assert "weights for the server" not in estimate(load_recipe("micro"), "disk")


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_footprint_of_a_dense_target_counts_teacher_and_its_logits():
    target = {"kind": "distribution", "teacher": "checkpoint:80"}
    sizes = {each.label: each.num_bytes for each in estimate_footprint(recipe(target=target), SHAPE, GPU)}
    # 1000 weights x 4 B; 70 tokens x 50 x 4 rows of 4 B
    assert sizes["teacher of the dense target"] == 4000
    assert sizes["teacher's logits of a chunk"] == 56000
    plain = {each.label for each in estimate_footprint(recipe(), SHAPE, GPU)}
    assert sizes.keys() - plain == {"teacher of the dense target", "teacher's logits of a chunk"}


def test_footprint_of_a_producer_counts_its_model_and_what_it_samples_with_during_the_update():
    stale = {"staleness": 1}
    needs = {each.label: each for each in list_allocations(recipe(train=stale), "gpu")}
    # 1000 weights x 4 B; 32 rows x 100 tokens x 40 x 4 B
    assert (needs["producer's weights"].num_bytes, needs["producer's weights"].phase) == (4000, "always")
    assert (needs["producer's KV cache"].num_bytes, needs["producer's KV cache"].phase) == (512_000, "always")
    vllm = recipe(train=stale, engine={"kind": "vllm", "vllm": {"enable_sleep_mode": True}})
    needs = {each.label: each for each in list_allocations(vllm, "gpu")}
    assert needs["vLLM"].phase == "always"
    assert needs.keys() & {"producer's weights", "producer's KV cache"} == {"producer's weights"}
    apart = recipe(train=stale, engine={"producer": {"device": "cuda:1"}})
    assert estimate(apart, "gpu") == estimate(recipe(), "gpu")
