"""TRL's own `_compute_loss` as an oracle, on the same log-probabilities and advantages."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from npo_cli.losses.types import LossInputs
from tests.losses.builders import divisors_of, make_loss, make_rows, mismatch_settings, with_matching_engine

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="the oracle is TRL 1.16, a development extra")
accelerate = pytest.importorskip("accelerate", reason="TRL needs it")

MASK = [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
ADVANTAGES = [1.5, -0.7, 0.4, -1.2]
NUM_COLUMNS = 5


class TrlTrainer(SimpleNamespace):
    """The attributes that TRL's `_compute_loss` reads of its trainer; the model's outputs are given, not computed."""

    def _get_per_token_logps_and_entropies(self, *_args: object, **_kwargs: object) -> tuple[Tensor, Tensor, None]:
        return self.logps_NT, self.entropies_NT, None


def trl_trainer(logps_NT: Tensor, entropies_NT: Tensor, **changes: object) -> TrlTrainer:
    settings = {
        "logps_NT": logps_NT,
        "entropies_NT": entropies_NT,
        "accelerator": accelerate.Accelerator(cpu=True),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        # Each micro-batch is a whole batch, so that TRL's own scaling for accumulation is 1.
        "current_gradient_accumulation_steps": 1,
        "args": SimpleNamespace(delta=changes.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1),
        "max_completion_length": NUM_COLUMNS,
        "importance_sampling_level": "token",
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "_entropy_bonus_enabled": changes.get("entropy_coef", 0.0) > 0,
        "use_adaptive_entropy": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "aux_loss_enabled": False,
    }
    return TrlTrainer(**(settings | changes))


CASES = {
    "grpo": ({}, {}),
    "clip_higher": ({"clip_high": 0.28}, {"epsilon_high": 0.28}),
    "delta": ({"delta": 1.5}, {"delta": 1.5}),
    "bnpo": ({"aggregation": "token_mean"}, {"loss_type": "bnpo"}),
    "dapo": ({"aggregation": "token_mean", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"aggregation": "seq_mean_token_sum_norm"}, {"loss_type": "dr_grpo"}),
    "gspo": (
        {"kind": "gspo", "clip_low": 0.03, "clip_high": 0.04},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    # TRL takes the cap itself as epsilon_high
    "cispo": (
        {"kind": "cispo", "aggregation": "token_mean", "cispo_cap": 1.1},
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    "kl": ({"kl_coef": 0.3}, {"beta": 0.3}),
    # the engine's weight is multiplied onto the clipped loss, and not onto the KL term
    "token_tis": (
        {"kl_coef": 0.3, "mismatch": mismatch_settings("token_tis", cap=1.1)},
        {"beta": 0.3, "use_vllm": True},
    ),
    "sequence_mis": ({"mismatch": mismatch_settings("sequence_mis")}, {"use_vllm": True}),
    # TRL's entropy bonus is a token mean whatever the loss, so only that aggregation is comparable
    "entropy": ({"aggregation": "token_mean", "entropy_coef": 0.2}, {"loss_type": "bnpo", "entropy_coef": 0.2}),
}


def trl_weights(rows: LossInputs, logps_NT: Tensor, *, case: str) -> Tensor:
    """`importance_sampling_ratio` as TRL's generation step makes it for token_truncate and sequence_mask."""
    old_NT = logps_NT.detach() if rows.old_logps_NT is None else rows.old_logps_NT
    difference_NT = (old_NT - rows.behavior_logps_NT) * rows.mask_NT
    if case == "token_tis":
        return difference_NT.exp().clamp(max=1.1)
    ratio_N1 = difference_NT.sum(dim=1, keepdim=True).exp()
    return ratio_N1.masked_fill((ratio_N1 < 0.5) | (ratio_N1 > 5.0), 0.0)


@pytest.mark.parametrize("old_is_current", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_trl_parity_of_loss_gradient_and_metrics(case, old_is_current):
    ours, theirs = CASES[case]
    generator = torch.Generator().manual_seed(3)
    # ratios spread around 1 by about e^0.4, so that both clips bite
    values_NT = -torch.rand(4, NUM_COLUMNS, generator=generator, dtype=torch.float64)
    old_NT = None if old_is_current else values_NT + 0.4 * torch.randn(values_NT.shape, generator=generator).double()
    ref_NT = values_NT + 0.2 * torch.randn(values_NT.shape, generator=generator).double()
    logps_NT = values_NT.requires_grad_()
    entropies_NT = torch.rand(4, NUM_COLUMNS, generator=generator, dtype=torch.float64).requires_grad_()

    rows = with_matching_engine(make_rows(ADVANTAGES, mask=MASK, old=old_NT), logps_NT)
    if "mismatch" in ours:
        # summed over up to 5 tokens, such noise leaves 0.5 and 5 on some rows
        noise_NT = 0.5 * torch.randn(values_NT.shape, generator=generator).double()
        rows = replace(rows, behavior_logps_NT=rows.behavior_logps_NT + noise_NT)
    terms = {"ref_logps_NT": ref_NT} if "kl_coef" in ours else {}
    loss, stats = make_loss(**ours)(logps_NT, rows, divisors=divisors_of(rows), entropies_NT=entropies_NT, **terms)
    trainer = trl_trainer(logps_NT, entropies_NT, **theirs)
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, NUM_COLUMNS, dtype=torch.long),
        "completion_mask": rows.mask_NT.long(),
        "advantages": rows.advantages_N,
        "old_per_token_logps": old_NT,
        "ref_per_token_logps": ref_NT,
        "num_items_in_batch": rows.mask_NT.sum(),
        "importance_sampling_ratio": trl_weights(rows, logps_NT, case=case),
    }
    oracle = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)

    assert loss.item() == pytest.approx(oracle.item(), rel=1e-6, abs=1e-9)
    leaves = (logps_NT, entropies_NT)
    for mine, other in zip(gradients(loss, leaves), gradients(oracle, leaves), strict=True):
        assert mine.flatten().tolist() == pytest.approx(other.flatten().tolist(), rel=1e-6, abs=1e-9)
    if case not in ("delta", "gspo", "cispo"):
        # TRL counts no delta cap, and one clip per sequence under GSPO
        metrics = trainer._metrics["train"]
        assert stats.metrics()["clip_ratio/low"] == pytest.approx(metrics["clip_ratio/low_mean"][0])
        assert stats.metrics()["clip_ratio/high"] == pytest.approx(metrics["clip_ratio/high_mean"][0])
        assert (stats.clipped_low + stats.clipped_high > 0) is not old_is_current
    if "mismatch" in ours:
        assert 0 < stats.metrics()["mismatch/clipped_fraction"] < 1
    if "kl_coef" in ours:
        assert stats.metrics()["kl"] == pytest.approx(trainer._metrics["train"]["kl"][0])


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(found, leaves, strict=True)]
