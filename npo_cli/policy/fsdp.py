"""One model in shards over several processes: torch's FSDP2, and what leaves it whole.

A layer is the unit: its weights are gathered for its forward and backward pass, by `fully_shard` and its own methods.
Whoever wants whole tensors (a checkpoint, an engine) gets them gathered one by one to rank 0; whoever has whole ones
sends them out the same way. Imports wait inside: a process that works alone knows nothing of this.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.config.recipe import DistributedSettings
from npo_cli.distributed.process_group import Worker, WorkerGroup
from npo_cli.policy.logprobs import PackedRows, TokenScores, token_scores
from npo_cli.policy.lora import AdapterInfo, adapter_tensors, base_tensors, read_fitting_adapters
from npo_cli.policy.weights_io import read_fitting_weights, tied_names

WeightScope = Literal["all", "base", "adapters"]
SCORE_METHOD = "npo_token_scores"
"""Name of the method by which a model in shards scores: FSDP2 gathers weights around methods that it was told of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingContext:
    """What a policy knows of the other processes that hold parts of its weights."""

    worker_group: WorkerGroup
    name: str
    """The model's name in pieces of work."""
    tied: Sequence[set[str]]
    """Names of one tensor, looked up while it was whole."""
    reshard_after_forward: bool
    """A layer's gathered weights go after its forward pass."""

    def gather_weights(self, part: WeightScope) -> dict[str, Tensor]:
        """Whole tensors on the CPU, gathered to rank 0."""
        return self.worker_group.broadcast(GatherWeights(name=self.name, scope=part, tied=self.tied))[0]

    def load(self, model: PreTrainedModel, adapters: AdapterInfo | None, folder: Path) -> None:
        """A checkpoint's weights or adapters; this process alone reads them, and the others get what fits."""
        if adapters is None:
            self.scatter_weights("all", read_fitting_weights(model, folder, tied=self.tied))
        else:
            self.scatter_weights("adapters", read_fitting_adapters(model, adapters, folder))

    def scatter_weights(self, part: WeightScope, tensors: Mapping[str, Tensor]) -> None:
        """Every process gets its shard of these whole tensors."""
        others = ScatterWeights(name=self.name, scope=part, names=tuple(tensors), tensors=None)
        mine = ScatterWeights(name=self.name, scope=part, names=tuple(tensors), tensors=tensors)
        self.worker_group.scatter([mine, *[others] * (self.worker_group.world_size - 1)])

    @contextmanager
    def unshard_weights(self, model: PreTrainedModel) -> Iterator[None]:
        """All weights whole in every process, so that each may make as many forward passes as it likes."""
        from torch.distributed.fsdp import FSDPModule

        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard_after_forward()
                part.set_reshard_after_forward(self.reshard_after_forward and part is not model, recurse=False)

    def token_scores(
        self, model: PreTrainedModel, packed: PackedRows, *, temperature: float, chunk_tokens: int, plain_head: bool
    ) -> TokenScores:
        """`logprobs.token_scores` with the weights gathered around it."""
        found = getattr(model, SCORE_METHOD)(
            packed, temperature=temperature, chunk_tokens=chunk_tokens, plain_head=plain_head
        )
        return TokenScores(logps_NT=found[0], entropies_NT=found[1], collisions_NT=found[2])


class UnshardedView:
    """A model in shards, for who wants its tensors whole: an engine that is sent them."""

    def __init__(self, model: PreTrainedModel, shared: ShardingContext) -> None:
        self._model, self._shared = model, shared

    @property
    def __class__(self) -> type:
        """The model's own."""
        return type(self._model)

    def state_dict(self) -> dict[str, Tensor]:
        """Gathered to rank 0's CPU memory."""
        return self._shared.gather_weights("all")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def shard_model(
    model: PreTrainedModel, settings: DistributedSettings, *, compute_dtype: torch.dtype, size: int
) -> list[set[str]]:
    """Cut the model's weights in place, a layer at a time; the names that shared a tensor before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    tied, layers = tied_names(model), set(model._no_split_modules or ())
    # Weights are gathered in the precision of the forward pass; gradients add up in that of the weights.
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    common = {
        "mesh": init_device_mesh(model.device.type, (size,)),
        "mp_policy": MixedPrecisionPolicy() if compute_dtype == model.dtype else mixed,
    }
    # A vision tower stays with the rest: a pass without pictures would not gather layers of its own in step.
    for module in [each for each in model.get_decoder().modules() if type(each).__name__ in layers]:
        fully_shard(module, **common, reshard_after_forward=settings.reshard_after_forward)
    # What is left (embedding, last norm, head) stays gathered between forward and backward: both ends need it.
    fully_shard(model, **common, reshard_after_forward=False)
    setattr(model, SCORE_METHOD, MethodType(_scores, model))
    register_fsdp_forward_method(model, SCORE_METHOD)
    return tied


def _scores(
    model: PreTrainedModel, packed: PackedRows, *, temperature: float, chunk_tokens: int, plain_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As a plain tuple: FSDP2 looks for tensors in what a method returns, and does not look into records."""
    found = token_scores(model, packed, temperature=temperature, chunk_tokens=chunk_tokens, plain_head=plain_head)
    if torch.is_grad_enabled() and not packed.vision_inputs:
        # Every process has a gradient for the same weights, 0 for those of a tower that it did not use.
        idle = [parameter for parameter in vision_tower_parameters(model) if parameter.requires_grad]
        found = replace(found, logps_NT=found.logps_NT + sum(0.0 * parameter.sum() for parameter in idle))
    return found.logps_NT, found.entropies_NT, found.collisions_NT


def vision_tower_parameters(model: PreTrainedModel) -> list[Tensor]:
    """Parameters of what a model sees with: neither text layers nor head."""
    text = {id(each) for part in (model.get_decoder(), model.get_output_embeddings()) for each in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in text]


def select_tensors(model: PreTrainedModel, part: WeightScope) -> dict[str, Tensor]:
    """The model's own tensors, or the base's, or the adapters', under the names of their files."""
    choose = {"all": PreTrainedModel.state_dict, "base": base_tensors, "adapters": adapter_tensors}
    return choose[part](model)


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "placements")


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if is_shard(tensor) else tensor


def to_scalar(tensor: Tensor) -> float:
    """The value of a number of which every process may hold a part."""
    return (tensor.full_tensor() if is_shard(tensor) else tensor).item()


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherWeights:
    """Whole tensors to rank 0."""

    name: str
    scope: WeightScope
    tied: Sequence[set[str]]
    phase = "gather the weights"

    def run(self, member: Worker) -> dict[str, Tensor] | None:
        """One tensor at a time; two names of one tensor stay that."""
        found, whole, leads = {}, {}, torch.distributed.get_rank() == 0
        first = {name: min(names) for names in self.tied for name in names}
        for name, tensor in select_tensors(member.models[self.name], self.scope).items():
            twin = first.get(name, name)
            if twin not in whole:
                full = tensor.full_tensor() if is_shard(tensor) else tensor
                whole[twin] = full.detach().cpu() if leads else None
            found[name] = whole[twin]
        return found if leads else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterWeights:
    """Rank 0's whole tensors to everybody's shards."""

    name: str
    scope: WeightScope
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] | None
    """Rank 0 alone has them."""
    phase = "spread the weights"

    @torch.no_grad()
    def run(self, member: Worker) -> None:
        """One tensor at a time, in place."""
        from torch.distributed.tensor import distribute_tensor

        model = member.models[self.name]
        own = select_tensors(model, self.scope)
        for name in self.names:
            mine = own[name]
            full = torch.empty(mine.shape, dtype=mine.dtype) if self.tensors is None else self.tensors[name]
            full = full.to(device=mine.device, dtype=mine.dtype)
            if is_shard(mine):
                mine.copy_(distribute_tensor(full, mine.device_mesh, mine.placements))
            else:
                torch.distributed.broadcast(full, src=0)
                mine.copy_(full)
        # As `Policy.mark_written` does where the load was asked for.
        torch.autograd.graph.increment_version(list(model.parameters()))
