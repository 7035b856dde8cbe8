"""Which device holds the model: one for a single process, one each for several."""

import torch

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
