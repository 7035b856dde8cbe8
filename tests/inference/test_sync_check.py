"""Weight sync checks: names and shapes before, log-probabilities of the check rows after."""

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


def test_named_tensors_include_a_tied_head():
    model = load_policy(ModelSettings(threads=1)).model
    assert model.config.tie_word_embeddings
    tensors = named_tensors(model)
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()


def test_copy_to_cpu_copies_only_tensors_that_share_a_storage(tmp_path):
    tensors = named_tensors(load_policy(ModelSettings(threads=1)).model)
    ready = copy_to_cpu(tensors)
    copied = {name for name, tensor in ready.items() if tensor.data_ptr() != tensors[name].data_ptr()}
    assert copied == {"lm_head.weight"}
    save_file(ready, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("offered", "message"),
    [
        ({"a.weight": torch.zeros(2, 3)}, "tensors missing: b.weight"),
        (TENSORS | {"c": torch.zeros(1)}, "tensors unknown to the engine: c"),
        (TENSORS | {"a.weight": torch.zeros(3, 2)}, "tensors in another shape: a.weight"),
        (TENSORS | {"b.weight": torch.tensor([1.0, math.nan, 0, 0])}, "tensors not finite: b.weight"),
    ],
)
def test_sent_tensors_must_match_those_the_engine_started_with(offered, message):
    with pytest.raises(RunFailed, match=message):
        check_sent_tensors(tensor_shapes(TENSORS), offered)
    check_sent_tensors(tensor_shapes(TENSORS), TENSORS)


def sync_check(engine, trainer, before=None):
    return SyncCheck(
        engine_logps=[tuple(engine)],
        trainer_logps=[tuple(trainer)],
        previous_logps=None if before is None else [tuple(before)],
    )


def test_sync_gap_is_the_mean_over_tokens():
    found = sync_check([-1.0, -2.0, -3.0], [-1.0, -2.3, -3.6])
    # (0 + .3 + .6)/3
    assert (found.mean_gap, found.max_gap) == (pytest.approx(0.3), pytest.approx(0.6))
    with pytest.raises(RunFailed, match=r"0\.3 nats per token \(maximum 0\.6\), engine\.sync_tolerance is 0\.29"):
        check_agreement(found, tolerance=0.29, version="step 4")
    check_agreement(found, tolerance=0.31, version="step 4")


def test_sync_gap_of_nan_is_infinite():
    with pytest.raises(RunFailed, match="inf nats"):
        check_agreement(sync_check([math.nan, -1.0], [-1.0, -1.0]), tolerance=1.0, version="step 4")


def noisy(values, *, seed, noise):
    rng = Random(seed)
    return [value + rng.gauss(0, noise) for value in values]


def test_sync_check_finds_stale_weights_within_the_tolerance():
    """Noise of .05 per token, weights that moved by .05: within the tolerance for bfloat16, but distinguishable.

    400 tokens: |old - new| = .05 * 20 = 1, so the fraction has a standard error of .05, and at most 1/8 is required.
    """
    old = [-1.0 - 0.01 * i for i in range(400)]
    new = [value + (0.05 if i % 2 else -0.05) for i, value in enumerate(old)]
    for seed in range(50):
        assert sync_check(noisy(old, seed=seed, noise=0.05), new, old).is_stale
        assert not sync_check(noisy(new, seed=seed, noise=0.05), new, old).is_stale


def test_sync_check_measures_the_fraction_of_old_weights():
    # 45 % old weights, with noise of a hundredth of the step
    old = [-1.0 - 0.01 * i for i in range(400)]
    new = [value + (0.01 if i % 2 else -0.01) for i, value in enumerate(old)]
    mixed = [0.45 * a + 0.55 * b for a, b in zip(old, new, strict=True)]
    found = sync_check(noisy(mixed, seed=1, noise=0.0001), new, old)
    assert found.stale_fraction == pytest.approx(0.45, abs=0.002)
    # s/sqrt(d) = .0001/(.01 * 20)
    assert found.stale_fraction_error == pytest.approx(0.0005, rel=0.1)
    assert found.is_stale
    # below a tenth only the tolerance applies
    slightly = [0.05 * a + 0.95 * b for a, b in zip(old, new, strict=True)]
    assert not sync_check(noisy(slightly, seed=1, noise=0.0001), new, old).is_stale


def test_sync_check_is_not_stale_if_the_weights_hardly_changed():
    old = [-1.0] * 40
    new = [-1.0001] * 40
    assert not any(sync_check(noisy(new, seed=seed, noise=0.05), new, old).is_stale for seed in range(200))
    # nor where nothing moved at all, nor at the first sync
    assert not sync_check(old, old, old).is_stale
    assert not sync_check(old, new).is_stale


def test_agreement_error_names_stale_weights():
    with pytest.raises(RunFailed, match=r"sync to step 4 failed: .* match the previous weights \(100%\)"):
        check_agreement(sync_check([-1.0, -2.0], [-1.5, -2.5], [-1.0, -2.0]), tolerance=9.0, version="step 4")
