"""The trainer's side of vLLM's weight-transfer API (0.32): init once, then start, update, finish with every sync.

Not run anywhere yet: NCCL and CUDA IPC need GPUs. vLLM does the transport; here it is told what to send.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from npo_cli.engines.vllm_words import Limits


def open_transfer(
    transport: str, *, url: str, tensors: Mapping[str, Tensor], limits: Limits
) -> Callable[[dict[str, Tensor], str], None]:
    """A function that sends tensors of these names and shapes; when it is there, the rendezvous is done."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Source(WeightSource):
        """The tensors at hand, in one order for both channels."""

        def __init__(self) -> None:
            self.tensors = dict(tensors)

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            yield from self.tensors.items()

    source = Source()
    client = HTTPVLLMWeightSyncClient(url, timeout=limits.deadline)
    sender = WeightTransferTrainerFactory.trainer_init(_init_info(transport, limits), client=client, source=source)

    def send(now: dict[str, Tensor], _version: str) -> None:
        source.tensors = now
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
