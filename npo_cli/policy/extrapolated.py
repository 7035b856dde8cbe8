"""A policy extrapolated away from an older copy of itself, in logits or in weights.

Logits: pi_t (pi_t / pi_old)^a, normalized per token; two models in memory. Weights: theta_t + a (theta_t - theta_old),
swapped in temporarily and restored bit for bit.

Of adapters the product B A is extrapolated, (1 + a) B_t A_t - a B_old A_old, by concatenation along the rank:
[(1 + a) B_t, -a B_old] and [A_t; A_old]. Extrapolating A and B separately would add
(a + a^2) (B_t - B_old) (A_t - A_old). The base is never written to.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from npo_cli.policy.logprobs import (
    Column,
    Head,
    TokenScores,
    mixed_precision,
    score_in_chunks,
)
from npo_cli.policy.lora import ADAPTER_NAME, PEFT_PREFIX, is_lora_A, read_fitting_adapters
from npo_cli.policy.model import Policy
from npo_cli.policy.packing import PackedRows, PackingCosts, TokenRow
from npo_cli.policy.weights_io import read_fitting_weights, tied_names
from npo_cli.types.rollouts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolatedPolicy:
    """pi_t (pi_t / pi_old)^a, from two models."""

    newer: Policy
    older: Policy
    strength: float
    """The exponent a."""

    @property
    def sharding(self) -> None:
        """Never sharded: one process holds both models."""

    @property
    def packing(self) -> PackingCosts | None:
        """As of both models, which have the same architecture."""
        return self.newer.packing

    def row(self, prompt: Prompt, response_ids: tuple[int, ...]) -> TokenRow:
        """Token ids of a prompt and a response; both models have the same tokenizer."""
        return self.newer.row(prompt, response_ids)

    def pack(self, rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None) -> PackedRows:
        """As of both models."""
        return self.newer.pack(rows, pack_sizes)

    def compute_hidden(self, packed: PackedRows) -> tuple[Tensor, Head]:
        """The hidden states of both, the newer ones first, and the head from them to extrapolated logits."""
        (new_UH, new_head), (old_UH, old_head) = (each.compute_hidden(packed) for each in (self.newer, self.older))
        head = _extrapolated_head(new_head, old_head, strength=self.strength, width=new_UH.shape[1])
        return torch.cat([new_UH, old_UH], dim=1), head

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[TokenRow],
        *,
        temperature: float,
        chunk_tokens: int,
        columns: Collection[Column] = (),
        pack_sizes: Sequence[int] | None = None,
    ) -> TokenScores:
        """Score responses under the extrapolated policy, as `Policy.score`; logits exist for one chunk at a time."""
        packed = self.pack(rows, pack_sizes)
        with mixed_precision(self.newer.model, self.newer.compute_dtype):
            joined_UX, head = self.compute_hidden(packed)
            return score_in_chunks(
                joined_UX, packed, head, chunk_tokens=chunk_tokens, temperature=temperature, columns=columns
            )


def _extrapolated_head(new: Head, old: Head, *, strength: float, width: int) -> Head:
    """z_t + a (z_t - z_old) from concatenated hidden states; the first `width` columns are the newer model's."""

    def logits(joined_UX: Tensor) -> Tensor:
        new_UW, old_UW = new(joined_UX[:, :width]).float(), old(joined_UX[:, width:]).float()
        return new_UW + strength * (new_UW - old_UW)

    return logits


@contextmanager
def extrapolate_weights(policy: Policy, folder: Path, *, strength: float) -> Iterator[None]:
    """Extrapolate the policy's weights away from those of a checkpoint; afterwards they are restored bit for bit."""
    original = replace_by_extrapolated(policy, folder, strength=strength)
    try:
        yield
    finally:
        _set_tensors(policy, original)


def replace_by_extrapolated(policy: Policy, folder: Path, *, strength: float) -> dict[str, Tensor]:
    """Extrapolate the policy's weights for good; returns the tensors that were replaced."""
    extrapolate = _extrapolate_all if policy.adapters is None else _extrapolate_adapters
    return _set_tensors(policy, extrapolate(policy, folder, strength))


def _set_tensors(policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these in the place of the policy's own, which are returned."""
    parameters = _own_tensors(policy)
    before = {name: parameters[name].data for name in tensors}
    for name, tensor in tensors.items():
        parameters[name].data = tensor
    policy.mark_weights_changed()
    return before


def _own_tensors(policy: Policy) -> dict[str, Tensor]:
    """Every tensor in memory by name, tied ones under each of their names."""
    return dict(policy.model.state_dict(keep_vars=True))


@torch.no_grad()
def _extrapolate_all(policy: Policy, folder: Path, strength: float) -> dict[str, Tensor]:
    """theta_t + a (theta_t - theta_old), computed in float32; a tied tensor is listed once."""
    own = _own_tensors(policy)
    old = read_fitting_weights(policy.model, folder, tied=tied_names(policy.model))
    by_storage = {own[name].data_ptr(): name for name in old}
    extrapolated = {}
    for name in by_storage.values():
        theta, theta_old = own[name].detach().float(), old[name].to(own[name].device).float()
        extrapolated[name] = (theta + strength * (theta - theta_old)).to(own[name].dtype)
    return extrapolated


@torch.no_grad()
def _extrapolate_adapters(policy: Policy, folder: Path, strength: float) -> dict[str, Tensor]:
    """Adapters of twice the rank with the product (1 + a) B_t A_t - a B_old A_old."""
    assert policy.adapters is not None
    own, old = _own_tensors(policy), _live_names(read_fitting_adapters(policy.model, policy.adapters, folder))
    joined = {}
    for name, tensor in old.items():
        now, before = own[name].detach(), tensor.to(own[name])
        is_A = is_lora_A(name)
        parts = [now, before] if is_A else [(1 + strength) * now, -strength * before]
        joined[name] = torch.cat(parts, dim=0 if is_A else 1)
    return joined


def _live_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From peft's names in files to those in memory."""
    return {
        name.removeprefix(PEFT_PREFIX).replace(".weight", f".{ADAPTER_NAME}.weight"): one
        for name, one in tensors.items()
    }
