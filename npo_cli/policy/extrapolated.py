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
    TokenRow,
    TokenScores,
    chunk_scores,
    join_chunks,
    mixed_precision,
    pack_rows,
    response_hidden,
    suppress_tokens,
)
from npo_cli.policy.lora import ADAPTER_NAME, PEFT_PREFIX, is_lora_A, read_fitting_adapters
from npo_cli.policy.model import Policy
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

    def row(self, prompt: Prompt, response_ids: tuple[int, ...]) -> TokenRow:
        """Token ids of a prompt and a response; both models have the same tokenizer."""
        return self.newer.row(prompt, response_ids)

    @torch.no_grad()
    def score(
        self, rows: Sequence[TokenRow], *, temperature: float, chunk_tokens: int, columns: Collection[Column] = ()
    ) -> TokenScores:
        """Score responses under the extrapolated policy; logits exist for one chunk of response tokens at a time."""
        packed = pack_rows(rows, pad_id=self.newer.pad_id, device=self.newer.device)
        packed = packed if self.newer.vision is None else self.newer.vision.attach_images(packed, rows)
        chunks = []
        with mixed_precision(self.newer.model, self.newer.compute_dtype):
            (new_MH, new_head), (old_MH, old_head) = (
                response_hidden(policy.model, packed, plain_head=policy.plain_head)
                for policy in (self.newer, self.older)
            )
            joined_MX = torch.cat([new_MH, old_MH], dim=1)
            head = _extrapolated_head(new_head, old_head, strength=self.strength, width=new_MH.shape[1])
            head = suppress_tokens(head, packed.suppressed_ids)
            for start in range(0, len(packed.target_M), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                inputs = (joined_MX[part], packed.target_M[part], head)
                chunks.append(chunk_scores(*inputs, temperature=temperature, columns=columns))
        return join_chunks(packed, chunks)


def _extrapolated_head(new: Head, old: Head, *, strength: float, width: int) -> Head:
    """z_t + a (z_t - z_old) from concatenated hidden states; the first `width` columns are the newer model's."""

    def logits(joined_MX: Tensor) -> Tensor:
        new_MW, old_MW = new(joined_MX[:, :width]).float(), old(joined_MX[:, width:]).float()
        return new_MW + strength * (new_MW - old_MW)

    return logits


@contextmanager
def extrapolate_weights(policy: Policy, folder: Path, *, strength: float) -> Iterator[None]:
    """Extrapolate the policy's weights away from those of a checkpoint; afterwards they are restored bit for bit."""
    extrapolate = _extrapolate_all if policy.adapters is None else _extrapolate_adapters
    extrapolated = extrapolate(policy, folder, strength)
    parameters = _own_tensors(policy)
    original = {name: parameters[name].data for name in extrapolated}
    try:
        for name, tensor in extrapolated.items():
            parameters[name].data = tensor
        policy.mark_weights_changed()
        yield
    finally:
        for name, tensor in original.items():
            parameters[name].data = tensor
        policy.mark_weights_changed()


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
