"""How the forward pass is computed: in the weights' own precision, or in bfloat16 over float32 weights.

Mixed precision: matrix products and attention in bfloat16, softmax and norms in float32, and gradients, moments and
weights in float32, so that small updates are not rounded away. Sampling computes alike (`engines/`), or every ratio of
trainer to sampler would carry the rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from npo_cli.errors import NpoError

LIGER_OPTIONS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Of Liger's kernels: log-probabilities are computed in `logprobs.py`, for response tokens alone."""


@contextmanager
def mixed_precision(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Compute in `compute_dtype`; nothing changes where the weights have it already."""
    with torch.autocast(model.device.type, dtype=compute_dtype, enabled=compute_dtype != model.dtype):
        yield


def patch_with_liger(model: PreTrainedModel) -> None:
    """Norms, rotary embedding and the gated MLP by Liger's Triton kernels, in place."""
    if model.device.type != "cuda":
        raise NpoError(
            "model.liger=true needs a GPU: its kernels are Triton's", "leave it out, or set model.device=cuda"
        )
    if find_spec("liger_kernel") is None:
        raise NpoError("model.liger=true, but liger-kernel is not installed", "pip install 'npo[liger]'")
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, LIGER_OPTIONS)
