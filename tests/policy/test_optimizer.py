"""The optimiser's state on the disk and back, its schedule, and the random streams."""

import random

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from npo_cli.config.recipe import ModelSettings, TrainSettings
from npo_cli.errors import NpoError
from npo_cli.policy.model import load_policy
from npo_cli.policy.optimizer import (
    TrainerState,
    build_optimizer,
    load_state,
    lr_at,
    save_state,
    seed_random_state,
    set_lr,
)
from tests.policy.models import qwen

UP = "model.layers.0.mlp.up_proj.weight"
STATE = TrainerState(step=2, position=8, running_metrics={"tokens_total": 123, "reward_ema": 0.1 + 0.2})


def trained(num_updates: int = 2, *, kind: str = "adamw"):
    model = qwen()
    optimizer = build_optimizer(model, TrainSettings(optimizer=kind))
    for update in range(num_updates):
        model(torch.tensor([[1, 2, 3 + update]])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_state_comes_back_exactly_and_the_next_update_is_the_same(tmp_path, kind):
    model, optimizer = trained(kind=kind)
    save_state(tmp_path, model, optimizer, state=STATE)
    twin = qwen()
    twin.load_state_dict(model.state_dict())
    other = build_optimizer(twin, TrainSettings(optimizer=kind))
    assert load_state(tmp_path, twin, other) == STATE
    for each, own in ((model, optimizer), (twin, other)):
        each(torch.tensor([[5, 6]])).logits.square().mean().backward()
        own.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_random_streams_are_restored(tmp_path):
    model, optimizer = trained()
    seed_random_state(7)
    random.gauss(0, 1)
    numpy.random.standard_normal()
    save_state(tmp_path, model, optimizer, state=STATE)

    def draws() -> tuple[float, ...]:
        return (torch.rand(1).item(), random.random(), random.gauss(0, 1), *numpy.random.standard_normal(3))

    first = draws()
    assert draws() != first
    load_state(tmp_path, model, optimizer)
    assert draws() == first


def test_streams_start_from_the_seed():
    seed_random_state(-3)
    first = (torch.rand(1).item(), random.random(), numpy.random.random())
    seed_random_state(-3)
    assert (torch.rand(1).item(), random.random(), numpy.random.random()) == first


def test_optimizer_state_without_a_moment_is_refused_by_name(tmp_path):
    model, optimizer = trained()
    save_state(tmp_path, model, optimizer, state=STATE)
    path = tmp_path / "optimizer.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight.exp_avg_sq")
    save_file(tensors, path)
    with pytest.raises(NpoError, match=r"optimizer state of model\.norm\.weight is missing"):
        load_state(tmp_path, model, optimizer)


def test_optimizer_state_before_any_update_is_restored(tmp_path):
    """Step 0, or a run whose every gradient so far was not finite."""
    model, optimizer = trained(0)
    save_state(tmp_path, model, optimizer, state=STATE)
    assert load_state(tmp_path, model, optimizer) == STATE
    assert not optimizer.state


@pytest.mark.parametrize(("entry", "shape"), [("row_var", (1, 12)), ("col_var", (12, 1))])
def test_optimizer_state_of_adafactor_with_wrong_shape_is_refused(tmp_path, entry, shape):
    model, optimizer = trained(kind="adafactor")
    save_state(tmp_path, model, optimizer, state=STATE)
    path = tmp_path / "optimizer.safetensors"
    tensors = load_file(path) | {f"{UP}.{entry}": torch.ones(shape)}
    save_file(tensors, path)
    with pytest.raises(NpoError, match="another shape or is not finite"):
        load_state(tmp_path, model, optimizer)


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix():
    model, optimizer = trained(kind="adafactor")
    rows, columns = model.get_parameter(UP).shape
    kept = optimizer.state[model.get_parameter(UP)]
    assert {name: tuple(value.shape) for name, value in kept.items()} == {
        "step": (),
        "row_var": (rows, 1),
        "col_var": (1, columns),
    }


def rates(schedule: str, *, warmup_steps: int = 2) -> list[float]:
    settings = TrainSettings(lr=1.0, schedule=schedule, warmup_steps=warmup_steps, num_steps=6, min_lr_ratio=0.2)
    return [round(lr_at(step, settings), 6) for step in range(1, 7)]


def test_rates_warm_up_and_then_decay_to_their_floor():
    # 2 steps up, then 4 steps in which progress is 1/4, 1/2, 3/4, 1
    assert rates("constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear") == [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    # 0.2 + 0.8 * (1 + cos(pi * progress)) / 2
    assert rates("cosine") == [0.5, 1.0, 0.882843, 0.6, 0.317157, 0.2]
    assert rates("linear", warmup_steps=0)[0] == round(1 - 0.8 / 6, 6)


def test_learning_rate_warmup_longer_than_the_run_is_finite():
    assert rates("cosine", warmup_steps=6) == [round(step / 6, 6) for step in range(1, 7)]
    settings = TrainSettings(lr=1.0, schedule="linear", warmup_steps=2, num_steps=2)
    assert lr_at(3, settings) == pytest.approx(0.1)


def test_learning_rate_is_one_for_all_parameters():
    _, optimizer = trained()
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_optimizer_update_and_load_count_as_weight_changes(tmp_path, options):
    policy = load_policy(ModelSettings(threads=1))
    policy.save(tmp_path)
    seen = [policy.num_weight_changes]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3, **options)
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    policy.mark_weights_changed()
    seen.append(policy.num_weight_changes)
    policy.load(tmp_path)
    seen.append(policy.num_weight_changes)
    assert seen == sorted(set(seen))
