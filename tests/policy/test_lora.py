"""LoRA adapters: a base that stays what it was, folders that peft opens, and adapters that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from npo_cli.config.recipe import LoraSettings, ModelSettings, TrainSettings
from npo_cli.errors import NpoError
from npo_cli.policy import lora as adapters_module
from npo_cli.policy.lora import adapter_tensors, base_tensors
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.policy.optimizer import build_optimizer, read_random_state
from tests.policy.models import qwen, save_model
from tests.policy.test_model import ROWS, gradient_of

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
ONE = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def with_lora(path: str = "micro-base", *, dtype: str = "float32", checkpointing: bool = False, **lora) -> Policy:
    settings = LoraSettings(**{"rank": 4} | lora)
    return load_policy(
        ModelSettings(path=path, threads=1, dtype=dtype, gradient_checkpointing=checkpointing, lora=settings)
    )


@torch.no_grad()
def moved(policy: Policy, seed: int = 0) -> Policy:
    """B away from 0, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_tensors(policy.model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) / 20)
    return policy


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_adapters_start_equal_to_the_base(dtype):
    plain = load_policy(ModelSettings(threads=1, dtype=dtype))
    assert torch.equal(logits(with_lora(dtype=dtype).model), logits(plain.model))


def test_lora_initialization_depends_on_its_seed_only():
    torch.manual_seed(1)
    first = adapter_tensors(with_lora(seed=3).model)
    torch.manual_seed(2)
    before = read_random_state()[0]["rng.torch"].clone()
    second = adapter_tensors(with_lora(seed=3).model)
    assert torch.equal(read_random_state()[0]["rng.torch"], before)
    other = adapter_tensors(with_lora(seed=4).model)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.equal(tensor, other[name]) == ("lora_B" in name)


def test_lora_trains_only_float32_adapters():
    policy = with_lora(dtype="bfloat16")
    trained = {name for name, each in policy.model.named_parameters() if each.requires_grad}
    # 3 layers x 7 linear ones x (A, B)
    assert len(trained) == 42 == len(adapter_tensors(policy.model))
    kinds = {name: each.dtype for name, each in policy.model.named_parameters()}
    assert {kinds[name] for name in trained} == {torch.float32}
    assert {kinds[name] for name in kinds.keys() - trained} == {torch.bfloat16}
    assert len(build_optimizer(policy.model, TrainSettings()).param_groups[0]["params"]) == 42


def test_lora_keeps_updates_below_the_bases_precision():
    """bfloat16 has 8 bits: 1 + 1/1000 would be 1 again."""
    policy = with_lora(dtype="bfloat16")
    (tensor, *_) = adapter_tensors(policy.model).values()
    with torch.no_grad():
        tensor.fill_(1.0).add_(1e-3)
    assert tensor.view(-1)[0].item() == pytest.approx(1.001, abs=1e-6)


def test_lora_base_weights_keep_names_and_values():
    plain = load_policy(ModelSettings(threads=1)).model.state_dict()
    found = base_tensors(moved(with_lora()).model)
    assert found.keys() == plain.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("lora", [{}, {"rank": 2, "alpha": 3.0, "targets": ("q_proj", "down_proj")}])
def test_lora_checkpoint_opens_in_peft(tmp_path, lora):
    policy = moved(with_lora(**lora))
    policy.save(tmp_path)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MICRO_BASE_FOLDER), tmp_path).eval()
    assert torch.equal(logits(theirs), logits(policy.model))
    assert not torch.equal(logits(policy.model), logits(AutoModelForCausalLM.from_pretrained(MICRO_BASE_FOLDER)))
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == adapter_tensors(policy.model).keys()


def test_lora_checkpoint_loads_again(tmp_path):
    policy = moved(with_lora())
    policy.save(tmp_path)
    fresh = with_lora()
    before = fresh.num_weight_changes
    fresh.load(tmp_path)
    assert fresh.num_weight_changes > before
    assert torch.equal(logits(fresh.model), logits(policy.model))
    assert fresh.digest == policy.digest != with_lora().digest
    kept = load_policy(ModelSettings(threads=1, lora=LoraSettings(rank=4)), tmp_path)
    assert kept.digest == policy.digest
    # 3 layers of q, k, v, o (96 x 96 each) and gate, up (96 -> 192), down (192 -> 96): 4 (4*192 + 3*288) floats
    assert policy.num_bytes == 3 * 4 * (4 * 192 + 3 * 288) * 4
    assert 0 < (tmp_path / "adapter_model.safetensors").stat().st_size - policy.num_bytes < 8_000


def test_lora_base_policy_scores_without_adapters():
    policy, plain = moved(with_lora()), load_policy(ModelSettings(threads=1))
    bare, ours, theirs = (
        each.score(ROWS, temperature=0.7, chunk_tokens=3).logps_NT for each in (policy.base_policy, policy, plain)
    )
    assert torch.equal(bare, theirs)
    assert not bare.requires_grad
    assert not torch.equal(ours, theirs)
    ours.sum().backward()
    assert all(each.grad is not None for each in policy.model.parameters() if each.requires_grad)


def test_lora_gradient_checkpointing_gives_the_same_gradient():
    kept, once = gradient_of(moved(with_lora()))
    recomputed, twice = gradient_of(moved(with_lora(checkpointing=True)))
    assert (once, twice) == (1, 2)
    for mine, theirs in zip(recomputed, kept, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


# What does not fit


def test_lora_unknown_target_lists_the_known_ones():
    """peft itself takes the known one and says nothing of the other."""
    with pytest.raises(NpoError, match="no linear layer named q_porj") as refused:
        with_lora(targets=("v_proj", "q_porj"))
    assert refused.value.hint.startswith("choose among down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")
    with pytest.raises(NpoError, match=r"no linear layer named lm_head \(the LM head cannot be a target\)"):
        with_lora(targets=("lm_head",))


def test_lora_without_peft_names_the_package(monkeypatch):
    monkeypatch.setattr(adapters_module, "find_spec", lambda name: None)
    with pytest.raises(NpoError, match=r"model\.lora\.rank=4 needs peft") as refused:
        with_lora()
    assert refused.value.hint == "pip install 'peft>=0.21,<0.22'"


def test_lora_adapters_of_another_base_are_refused(tmp_path):
    save_model(qwen(seed=0), tmp_path / "one")
    save_model(qwen(seed=1), tmp_path / "two")
    with_lora(str(tmp_path / "one")).save(tmp_path)
    with pytest.raises(NpoError, match=r"belong to another base than .*two: to .*one"):
        with_lora(str(tmp_path / "two")).load(tmp_path)
    # The same weights in another place are the same base.
    (tmp_path / "one").rename(tmp_path / "moved")
    with_lora(str(tmp_path / "moved")).load(tmp_path)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "r 4 instead of 8"),
        ({"alpha": 16.0}, r"lora_alpha 32\.0 instead of 16\.0"),
        ({"targets": ("q_proj",)}, "target_modules .* instead of .'q_proj'."),
    ],
)
def test_lora_adapters_of_another_rank_or_scale_are_refused(tmp_path, lora, message):
    with_lora().save(tmp_path)
    with pytest.raises(NpoError, match=f"the adapters have {message}"):
        with_lora(**lora).load(tmp_path)


def nan_in(tensors) -> None:
    tensors[ONE].view(-1)[0] = float("nan")


DAMAGES = {
    "missing": lambda tensors: tensors.pop(ONE),
    "extra": lambda tensors: tensors.update(stranger=torch.zeros(2)),
    "of another shape": lambda tensors: tensors.update({ONE: torch.zeros(3, 3)}),
    "not finite": nan_in,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_lora_adapters_that_do_not_match_leave_the_policy_unchanged(tmp_path, what):
    moved(with_lora()).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    DAMAGES[what](tensors)
    save_file(tensors, path)
    policy = with_lora()
    before = policy.digest
    with pytest.raises(NpoError, match=f"tensor {what}: {'stranger' if what == 'extra' else ONE}"):
        policy.load(tmp_path)
    assert policy.digest == before


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def emptied(folder: Path, name: str) -> None:
    (folder / name).write_text("[]")


def unnamed(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"peft_type": "LORA"}))


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (without, "adapter_model.safetensors", r"has no adapter_model\.safetensors"),
        (without, "npo_base.json", r"npo_base\.json cannot be read"),
        (emptied, "npo_base.json", r"npo_base\.json is not a JSON object"),
        (without, "adapter_config.json", r"adapter_config\.json cannot be read"),
        (unnamed, "adapter_config.json", "no rank, alpha or targets"),
        (unnamed, "npo_base.json", "belong to another base"),
    ],
)
def test_lora_incomplete_checkpoint_is_named(tmp_path, damage, name, message):
    with_lora().save(tmp_path)
    damage(tmp_path, name)
    with pytest.raises(NpoError, match=message):
        with_lora().load(tmp_path)
