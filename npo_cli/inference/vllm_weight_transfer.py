"""The trainer's side of vLLM's weight-transfer API (0.32): init once, then start, update, finish with every sync.

Not run anywhere yet: NCCL and CUDA IPC need GPUs. vLLM does the transport; here it is told what to send, and by which
GPU of the trainer. C++ cannot be interrupted, so each part has a deadline that ends the process.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from npo_cli.inference.process import exit_on_timeout
from npo_cli.inference.sync_check import RESUME_HINT
from npo_cli.inference.vllm_common import VllmLimits

PostRequest = Callable[..., Any]
"""Path and JSON body to the server, key included."""


class WeightTransferClient:
    """vLLM's `VLLMWeightSyncClient` over the connection that is there."""

    def __init__(self, post: PostRequest) -> None:
        self.post = post

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell the workers where to meet."""
        self.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Tensors are coming."""
        self.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """What is being sent; handles that JSON cannot hold are packed by vLLM."""
        from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

        self.post("update_weights", {"update_info": _json_safe_update_payload(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All of them were sent; the version is stamped once the caches are dropped."""
        self.post("finish_weight_update")


def open_weight_transfer(
    transport: str, *, post: PostRequest, tensors: Mapping[str, Tensor], limits: VllmLimits
) -> Callable[[dict[str, Tensor], str], None]:
    """A function that sends tensors of these names and shapes; when it is there, the rendezvous is done."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Source(WeightSource):
        """The tensors at hand, in one order for both channels."""

        def __init__(self) -> None:
            self.tensors = dict(tensors)

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            yield from self.tensors.items()

    source, device = Source(), next(iter(tensors.values())).device
    with (
        exit_on_timeout(limits.start_timeout, phase="meet for the first weights", hint=RESUME_HINT),
        torch.cuda.device(device),
    ):
        info = _init_info(transport, limits)
        sender = WeightTransferTrainerFactory.trainer_init(info, client=WeightTransferClient(post), source=source)

    def send(now: dict[str, Tensor], _version: str) -> None:
        source.tensors = now
        with exit_on_timeout(limits.deadline, phase="take weights", hint=RESUME_HINT), torch.cuda.device(device):
            sender.send_weights()

    return send


def _init_info(transport: str, limits: VllmLimits) -> Any:
    if transport == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=0)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    workers = limits.tensor_parallel_size * limits.data_parallel_size
    return NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=port, world_size=1 + workers)
