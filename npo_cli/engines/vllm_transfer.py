"""The trainer's side of vLLM's weight-transfer API (0.32): init once, then start, update, finish with every sync.

Not run anywhere yet: NCCL and CUDA IPC need GPUs. vLLM does the transport; here it is told what to send, and by which
GPU of the trainer. C++ cannot be interrupted, so each part has a deadline that ends the process.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from npo_cli.engines.sync import RESUME
from npo_cli.engines.vllm_words import Limits
from npo_cli.engines.watch import within

Post = Callable[..., Any]
"""Path and JSON body to the server, key included."""


class Client:
    """vLLM's `VLLMWeightSyncClient` over the connection that is there."""

    def __init__(self, post: Post) -> None:
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


def open_transfer(
    transport: str, *, post: Post, tensors: Mapping[str, Tensor], limits: Limits
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
    with within(limits.start_timeout, phase="meet for the first weights", mend=RESUME), torch.cuda.device(device):
        info = _init_info(transport, limits)
        sender = WeightTransferTrainerFactory.trainer_init(info, client=Client(post), source=source)

    def send(now: dict[str, Tensor], _version: str) -> None:
        source.tensors = now
        with within(limits.deadline, phase="take weights", mend=RESUME), torch.cuda.device(device):
            sender.send_weights()

    return send


def _init_info(transport: str, limits: Limits) -> Any:
    if transport == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=0)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    workers = limits.tensor_parallel * limits.data_parallel
    return NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=port, world_size=1 + workers)
