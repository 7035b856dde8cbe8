"""Device and precision of the model, and Liger kernels.

Mixed precision: matrix products and attention in bfloat16; softmax, norms, gradients, optimizer moments and weights in
float32, so that small updates are not rounded away. Engines sample in the same precision; otherwise every importance
ratio would contain the rounding error.
"""

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from npo_cli.errors import NpoError


def choose_device(requested: str, *, setting: str = "model.device") -> torch.device:
    """The device that a setting names: `auto` is a GPU if there is one; a GPU that does not exist is an error."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise NpoError(f"{setting}={requested} is not supported", f"set {setting} to auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise NpoError(
            f"{setting}={requested}, but torch finds no such GPU", f"set {setting}=cpu (npo doctor lists the GPUs)"
        )
    return device


def set_process_device(local_rank: int, *, local_size: int, requested: str) -> None:
    """With GPUs, give each process of a machine its own."""
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return
    if requested not in ("auto", "cuda"):
        raise NpoError(f"model.device={requested} puts every process on one device", "set model.device=auto")
    if torch.cuda.device_count() < local_size:
        raise NpoError(
            f"{local_size} processes on this machine, but torch finds {torch.cuda.device_count()} GPUs",
            "start as many processes as there are GPUs (torchrun --nproc-per-node N), or set model.device=cpu",
        )
    torch.cuda.set_device(local_rank)


LIGER_OPTIONS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Without Liger's loss kernels: `logprobs.py` computes log-probabilities of response tokens only."""


def patch_with_liger(model: PreTrainedModel) -> None:
    """Use Liger's Triton kernels for norms, rotary embedding and the gated MLP, in place."""
    if model.device.type != "cuda":
        raise NpoError("model.liger=true needs a GPU (Triton kernels)", "remove it, or set model.device=cuda")
    if find_spec("liger_kernel") is None:
        raise NpoError("model.liger=true, but liger-kernel is not installed", "pip install 'npo-cli[liger]'")
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, LIGER_OPTIONS)
