"""Which device holds the model: one for a single process, one each for several.

How the forward pass is computed: in the weights' own precision, or in bfloat16 over float32 weights.

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


def choose_device(requested: str) -> torch.device:
    """`auto` takes a GPU where there is one; a GPU asked for and absent is an error."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise NpoError(
            f"model.device={requested} is no device that npo uses", "set model.device to auto, cpu, cuda or cuda:N"
        )
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise NpoError(
            f"model.device={requested}, but torch sees no such GPU", "set model.device=cpu (npo doctor lists the GPUs)"
        )
    return device


def set_process_device(local_rank: int, *, local_size: int, requested: str) -> None:
    """Every process of a machine takes a GPU of its own, where GPUs are used."""
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return
    if requested not in ("auto", "cuda"):
        raise NpoError(
            f"model.device={requested} puts every process on one device", "leave model.device=auto: each takes its own"
        )
    if torch.cuda.device_count() < local_size:
        raise NpoError(
            f"{local_size} processes on this machine, but torch sees {torch.cuda.device_count()} GPUs",
            "start as many processes as there are GPUs (torchrun --nproc-per-node N), or set model.device=cpu",
        )
    torch.cuda.set_device(local_rank)


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
