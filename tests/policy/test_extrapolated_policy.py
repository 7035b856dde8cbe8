"""Weights extrapolated along their own change, theta + a (theta - theta_old), and restored bit for bit."""

from pathlib import Path

import pytest
import torch

from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import NpoError
from npo_cli.policy.extrapolated import extrapolate_weights
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.packing import TokenRow

ROWS = [TokenRow(prompt_ids=(1, 2, 3), response_ids=(4, 5)), TokenRow(prompt_ids=(2,), response_ids=(6, 7, 8))]


def perturb(policy: Policy, *, seed: int, by: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
    policy.mark_weights_changed()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "older").mkdir()
    return tmp_path / "older"


def logps(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.score(ROWS, temperature=1.0, chunk_tokens=64).logps_NT


def test_extrapolated_weights_move_by_a_times_their_change_and_are_restored(folder):
    policy = load_policy(ModelSettings(threads=1))
    policy.save(folder)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    perturb(policy, seed=0)
    now = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    digest, changes = policy.digest, policy.num_weight_changes
    with extrapolate_weights(policy, folder, strength=0.5):
        for name, tensor in policy.model.state_dict().items():
            # theta + 0.5 (theta - theta_old)
            assert torch.allclose(tensor, now[name] + 0.5 * (now[name] - before[name]), atol=1e-6)
        inside = policy.num_weight_changes
    assert policy.digest == digest
    assert changes < inside < policy.num_weight_changes, "an engine with weights of its own must see each change"


def test_extrapolated_weights_are_restored_after_a_failure(folder):
    policy = load_policy(ModelSettings(threads=1))
    policy.save(folder)
    perturb(policy, seed=0)
    digest = policy.digest
    with pytest.raises(KeyboardInterrupt), extrapolate_weights(policy, folder, strength=2.0):
        assert policy.digest != digest
        raise KeyboardInterrupt
    assert policy.digest == digest


def test_extrapolated_weights_of_a_missing_folder_change_nothing(folder, tmp_path):
    policy = load_policy(ModelSettings(threads=1))
    digest = policy.digest
    with pytest.raises(NpoError), extrapolate_weights(policy, tmp_path / "nothing", strength=1.0):
        pass
    assert policy.digest == digest


@pytest.fixture
def lora() -> ModelSettings:
    return ModelSettings(threads=1, lora={"rank": 2})


def products(policy: Policy) -> dict[str, torch.Tensor]:
    """B A of each layer, before peft's scale."""
    own = policy.model.state_dict()
    halves = [name.split("lora_A.default") for name in own if "lora_A.default" in name]
    return {head: own[f"{head}lora_B.default{tail}"] @ own[f"{head}lora_A.default{tail}"] for head, tail in halves}


def test_extrapolated_adapter_moves_the_product_and_not_the_base(lora, folder):
    policy = load_policy(lora)
    perturb(policy, seed=0)
    policy.save(folder)
    before = products(policy)
    perturb(policy, seed=1)
    now, digest = products(policy), policy.digest
    base = {name: tensor.clone() for name, tensor in policy.base_weights.items()}
    with extrapolate_weights(policy, folder, strength=3.0):
        found = products(policy)
        assert found.keys() == now.keys() == before.keys()
        for name in found:
            # (1 + 3) B A - 3 B_old A_old
            assert torch.allclose(found[name], 4 * now[name] - 3 * before[name], atol=1e-5)
        ranks = {tensor.shape[0] for name, tensor in policy.model.state_dict().items() if ".lora_A." in name}
        assert ranks == {4}
        assert all(torch.equal(tensor, base[name]) for name, tensor in policy.base_weights.items())
        inside = logps(policy)
    assert policy.digest == digest
    assert not torch.allclose(inside, logps(policy), atol=1e-3)


def test_extrapolated_adapter_is_readable_by_peft(lora, folder, tmp_path):
    from peft import PeftModel

    policy = load_policy(lora)
    perturb(policy, seed=0)
    policy.save(folder)
    perturb(policy, seed=1)
    (tmp_path / "joined").mkdir()
    with extrapolate_weights(policy, folder, strength=1.5):
        policy.save(tmp_path / "joined")
        inside = logps(policy)
    other = load_policy(ModelSettings(threads=1))
    PeftModel.from_pretrained(other.model, tmp_path / "joined")
    assert torch.allclose(logps(other), inside, atol=1e-5)
    assert not torch.allclose(logps(policy), inside, atol=1e-3)


def test_extrapolated_adapter_is_the_product_and_not_factor_by_factor(lora, folder):
    """B A is bilinear: moving A and B each by a times its change gives (a + a^2) dB dA on top."""
    policy = load_policy(lora)
    perturb(policy, seed=0)
    policy.save(folder)
    own = policy.model.state_dict()
    name = next(name for name in own if "lora_A.default" in name)
    a_old, b_old = own[name].clone(), own[name.replace("lora_A", "lora_B")].clone()
    perturb(policy, seed=1)
    a, b = own[name].clone(), own[name.replace("lora_A", "lora_B")].clone()
    with extrapolate_weights(policy, folder, strength=1.0):
        found = products(policy)[name.split("lora_A.default")[0]]
    factors = (2 * b - b_old) @ (2 * a - a_old)
    # a = 1: 1 + 1 = 2 times dB dA
    assert torch.allclose(factors - found, 2 * (b - b_old) @ (a - a_old), atol=1e-5)
