"""The trainer's side of vLLM's weight-transfer API (0.32): init once, then start, update, finish for every sync.

Never run so far: NCCL and CUDA IPC need GPUs. vLLM does the transport. Its C++ code cannot be interrupted, so each part
has a deadline that ends the process.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from npo_cli.config.engine import VllmSettings
from npo_cli.inference.process import exit_on_timeout
from npo_cli.inference.sync_check import RESUME_HINT

PostRequest = Callable[..., Any]
"""POST to the server: path and JSON body."""


class WeightTransferClient:
    """vLLM's `VLLMWeightSyncClient` over the engine's HTTP session."""

    def __init__(self, post: PostRequest) -> None:
        self.post = post

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Send the rendezvous address to the workers."""
        self.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Announce a transfer."""
        self.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Send the metadata; vLLM encodes handles that JSON cannot hold."""
        from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

        self.post("update_weights", {"update_info": _json_safe_update_payload(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End a transfer. The engine sets the version later, after the prefix cache is reset."""
        self.post("finish_weight_update")


def open_weight_transfer(
    transport: str, *, post: PostRequest, tensors: Mapping[str, Tensor], vllm: VllmSettings
) -> Callable[[dict[str, Tensor], str], None]:
    """Rendezvous with the workers; returns a function that sends tensors of these names and shapes."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Source(WeightSource):
        """The current tensors; metadata and data come in the same order."""

        def __init__(self) -> None:
            self.tensors = dict(tensors)

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            yield from self.tensors.items()

    source, device = Source(), next(iter(tensors.values())).device
    with (
        exit_on_timeout(vllm.start_timeout, phase="weight transfer setup", hint=RESUME_HINT),
        torch.cuda.device(device),
    ):
        info = _init_info(transport, vllm)
        sender = WeightTransferTrainerFactory.trainer_init(info, client=WeightTransferClient(post), source=source)

    def send(tensors: dict[str, Tensor], _version: str) -> None:
        source.tensors = tensors
        with exit_on_timeout(vllm.timeout, phase="weight sync", hint=RESUME_HINT), torch.cuda.device(device):
            sender.send_weights()

    return send


def _init_info(transport: str, vllm: VllmSettings) -> Any:
    if transport == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=0)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    workers = vllm.tensor_parallel_size * vllm.data_parallel_size
    return NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=port, world_size=1 + workers)
