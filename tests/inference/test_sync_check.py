"""What is compared before weights are sent, and what two sides must say of one probe afterwards."""

import math
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import RunFailed
from npo_cli.inference.sync_check import (
    SyncCheck,
    check_agreement,
    check_sent_tensors,
    copy_to_cpu,
    named_tensors,
    tensor_shapes,
)
from npo_cli.policy.model import load_policy

TENSORS = {"a.weight": torch.zeros(2, 3), "b.weight": torch.ones(4)}


def test_a_tied_head_is_sent_under_its_own_name():
    model = load_policy(ModelSettings(threads=1)).model
    assert model.config.tie_word_embeddings
    tensors = named_tensors(model)
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()


def test_a_second_name_is_copied_and_nothing_else_is(tmp_path):
    tensors = named_tensors(load_policy(ModelSettings(threads=1)).model)
    ready = copy_to_cpu(tensors)
    copied = {name for name, tensor in ready.items() if tensor.data_ptr() != tensors[name].data_ptr()}
    assert copied == {"lm_head.weight"}
    save_file(ready, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("offered", "told"),
    [
        ({"a.weight": torch.zeros(2, 3)}, "tensor missing: b.weight"),
        (TENSORS | {"c": torch.zeros(1)}, "tensor unknown to the engine: c"),
        (TENSORS | {"a.weight": torch.zeros(3, 2)}, "tensor of another shape: a.weight"),
        (TENSORS | {"b.weight": torch.tensor([1.0, math.nan, 0, 0])}, "tensor not finite: b.weight"),
    ],
)
def test_other_tensors_than_the_engine_started_with_are_not_sent(offered, told):
    with pytest.raises(RunFailed, match=told):
        check_sent_tensors(tensor_shapes(TENSORS), offered)
    check_sent_tensors(tensor_shapes(TENSORS), TENSORS)


def agreement(engine, trainer, before=None):
    return SyncCheck(
        engine_logps=[tuple(engine)],
        trainer_logps=[tuple(trainer)],
        previous_logps=None if before is None else [tuple(before)],
    )


def test_the_gap_is_a_mean_over_tokens():
    found = agreement([-1.0, -2.0, -3.0], [-1.0, -2.3, -3.6])
    # (0 + .3 + .6)/3
    assert (found.mean_gap, found.max_gap) == (pytest.approx(0.3), pytest.approx(0.6))
    with pytest.raises(
        RunFailed, match=r"differ by 0\.3 nats .* average, 0\.6 at most; engine\.sync_tolerance is 0\.29"
    ):
        check_agreement(found, tolerance=0.29, version="step 4")
    check_agreement(found, tolerance=0.31, version="step 4")


def test_scores_that_are_no_numbers_agree_with_nothing():
    with pytest.raises(RunFailed, match="inf nats"):
        check_agreement(agreement([math.nan, -1.0], [-1.0, -1.0]), tolerance=1.0, version="step 4")


def noisy(values, *, seed, noise):
    rng = Random(seed)
    return [value + rng.gauss(0, noise) for value in values]


def test_an_engine_nearer_to_the_old_weights_is_stale_however_small_the_gap():
    """Noise of .05 a token, weights that moved by .05: within any tolerance for bfloat16, and yet told apart.

    400 tokens: sqrt(d) = .05 * 20 = 1, so the share has an error of .05, and 1/8 is asked for.
    """
    old = [-1.0 - 0.01 * i for i in range(400)]
    new = [value + (0.05 if i % 2 else -0.05) for i, value in enumerate(old)]
    for seed in range(50):
        assert agreement(noisy(old, seed=seed, noise=0.05), new, old).is_stale
        assert not agreement(noisy(new, seed=seed, noise=0.05), new, old).is_stale


def test_a_mixture_is_told_by_its_share_of_the_old_weights():
    # 45 % of the way back, with noise a hundredth of the step
    old = [-1.0 - 0.01 * i for i in range(400)]
    new = [value + (0.01 if i % 2 else -0.01) for i, value in enumerate(old)]
    mixed = [0.45 * a + 0.55 * b for a, b in zip(old, new, strict=True)]
    found = agreement(noisy(mixed, seed=1, noise=0.0001), new, old)
    assert found.stale_fraction == pytest.approx(0.45, abs=0.002)
    # s/sqrt(d) = .0001/(.01 * 20)
    assert found.stale_fraction_error == pytest.approx(0.0005, rel=0.1)
    assert found.is_stale
    # a tenth is left to the tolerance
    slightly = [0.05 * a + 0.95 * b for a, b in zip(old, new, strict=True)]
    assert not agreement(noisy(slightly, seed=1, noise=0.0001), new, old).is_stale


def test_weights_that_hardly_moved_cannot_be_told_from_the_old_ones_and_nobody_is_accused():
    old = [-1.0] * 40
    new = [-1.0001] * 40
    assert not any(agreement(noisy(new, seed=seed, noise=0.05), new, old).is_stale for seed in range(200))
    # nor where nothing moved at all, nor at the first sync
    assert not agreement(old, old, old).is_stale
    assert not agreement(old, new).is_stale


def test_a_stale_engine_is_told_by_that_name():
    with pytest.raises(RunFailed, match=r"still holds weights from before the sync to step 4.* 100% of the way back"):
        check_agreement(agreement([-1.0, -2.0], [-1.5, -2.5], [-1.0, -2.0]), tolerance=9.0, version="step 4")
