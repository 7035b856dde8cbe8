"""One model in shards over several ranks: torch's FSDP2, and its weights as whole tensors.

A layer is the unit: its weights are gathered for its forward and backward pass by `fully_shard`. Whole tensors (of a
checkpoint, for an engine) are gathered one by one to rank 0, and distributed from rank 0 in the same way. All ranks
call these functions together. FSDP2 is imported only where a model is sharded.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.config.recipe import DistributedSettings
from npo_cli.distributed.process_group import current_group
from npo_cli.policy.logprobs import Column, Head, Teacher, TokenScores, response_hidden, token_scores
from npo_cli.policy.lora import AdapterInfo, adapter_tensors, base_tensors, read_fitting_adapters
from npo_cli.policy.packing import PackedRows
from npo_cli.policy.weights_io import read_fitting_weights, tied_names

WeightScope = Literal["all", "base", "adapters"]
SCORE_METHOD = "npo_token_scores"
"""Method by which a sharded model scores: FSDP2 gathers weights around registered methods."""
HIDDEN_METHOD = "npo_hidden_states"
"""Method by which a sharded teacher computes hidden states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingContext:
    """How a model's weights lie in shards."""

    tied: Sequence[set[str]]
    """Names of one tensor, looked up while it was whole."""
    reshard_after_forward: bool
    """A layer's gathered weights are freed after its forward pass."""

    def gather_weights(self, model: PreTrainedModel, scope: WeightScope) -> dict[str, Tensor]:
        """Whole tensors on rank 0's CPU, one at a time; other ranks get none. Two names of one tensor stay that."""
        found, whole, is_main = {}, {}, current_group().is_main
        first = {name: min(names) for names in self.tied for name in names}
        with current_group().phase("gather the weights"):
            for name, tensor in select_tensors(model, scope).items():
                twin = first.get(name, name)
                if twin not in whole:
                    full = tensor.full_tensor() if is_shard(tensor) else tensor
                    whole[twin] = full.detach().cpu() if is_main else None
                found[name] = whole[twin]
        return found if is_main else {}

    @torch.no_grad()
    def load(self, model: PreTrainedModel, adapters: AdapterInfo | None, folder: Path) -> None:
        """A checkpoint's weights or adapters: rank 0 reads and checks them, each rank receives its shards."""
        from torch.distributed.tensor import distribute_tensor

        tensors: dict[str, Tensor] = {}

        def read() -> list[str]:
            if adapters is None:
                tensors.update(read_fitting_weights(model, folder, tied=self.tied))
            else:
                tensors.update(read_fitting_adapters(model, adapters, folder))
            return list(tensors)

        names = current_group().run_on_main(read, phase="read the weights")
        own = select_tensors(model, "all" if adapters is None else "adapters")
        with current_group().phase("distribute the weights"):
            for name in names:
                mine = own[name]
                full = tensors[name] if tensors else torch.empty(mine.shape, dtype=mine.dtype)
                full = full.to(device=mine.device, dtype=mine.dtype)
                if is_shard(mine):
                    mine.copy_(distribute_tensor(full, mine.device_mesh, mine.placements))
                else:
                    torch.distributed.broadcast(full, src=0, group=current_group().torch_group)
                    mine.copy_(full)

    @contextmanager
    def unshard_weights(self, model: PreTrainedModel) -> Iterator[None]:
        """All weights whole on every rank, so that each may make as many forward passes as it likes."""
        from torch.distributed.fsdp import FSDPModule

        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(self.reshard_after_forward and part is not model, recurse=False)

    def token_scores(
        self,
        model: PreTrainedModel,
        packed: PackedRows,
        *,
        temperature: float,
        chunk_tokens: int,
        plain_head: bool,
        columns: Collection[Column] = (),
        teacher: Teacher | None = None,
    ) -> TokenScores:
        """`logprobs.token_scores` with the weights gathered around it."""
        options = {"temperature": temperature, "chunk_tokens": chunk_tokens, "plain_head": plain_head}
        return TokenScores(**getattr(model, SCORE_METHOD)(packed, **options, columns=columns, teacher=teacher))

    def response_hidden(self, model: PreTrainedModel, packed: PackedRows, *, plain_head: bool) -> tuple[Tensor, Head]:
        """`logprobs.response_hidden` with the weights gathered around it. The head stays whole for its later calls."""
        hidden_UH = getattr(model, HIDDEN_METHOD)(packed, plain_head=plain_head)
        return hidden_UH, model.get_output_embeddings() if plain_head else torch.nn.Identity()


def shard_model(
    model: PreTrainedModel, settings: DistributedSettings, *, compute_dtype: torch.dtype, torch_group: object
) -> ShardingContext:
    """Shard the model's weights in place, a layer at a time, over the ranks of `torch_group`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    tied, layers = tied_names(model), set(model._no_split_modules or ())
    # Weights are gathered in the precision of the forward pass; gradients are reduced in that of the weights.
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    common = {
        "mesh": DeviceMesh.from_group(torch_group, model.device.type),
        "mp_policy": MixedPrecisionPolicy() if compute_dtype == model.dtype else mixed,
    }
    # A vision tower belongs to the rest: in a pass without images its own layers would not be gathered on all ranks.
    for module in [each for each in model.get_decoder().modules() if type(each).__name__ in layers]:
        fully_shard(module, **common, reshard_after_forward=settings.reshard_after_forward)
    # The rest (embedding, last norm, head) stays gathered between forward and backward, which both use it.
    fully_shard(model, **common, reshard_after_forward=False)
    setattr(model, SCORE_METHOD, MethodType(_scores, model))
    register_fsdp_forward_method(model, SCORE_METHOD)
    setattr(model, HIDDEN_METHOD, MethodType(_hidden_states, model))
    register_fsdp_forward_method(model, HIDDEN_METHOD)
    return ShardingContext(tied=tied, reshard_after_forward=settings.reshard_after_forward)


def _scores(model: PreTrainedModel, packed: PackedRows, **options: Any) -> dict[str, Tensor]:
    """As a dictionary: FSDP2 finds tensors in a returned one, not in a dataclass."""
    scores = token_scores(model, packed, **options)
    found = {each.name: getattr(scores, each.name) for each in fields(scores)}
    if torch.is_grad_enabled() and not packed.vision_inputs:
        # All ranks need a gradient for the same weights: 0 for those of an unused vision tower.
        unused = [parameter for parameter in vision_tower_parameters(model) if parameter.requires_grad]
        found["logps_NT"] = found["logps_NT"] + sum(0.0 * parameter.sum() for parameter in unused)
    return found


def _hidden_states(model: PreTrainedModel, packed: PackedRows, *, plain_head: bool) -> Tensor:
    return response_hidden(model, packed, plain_head=plain_head)[0]


def vision_tower_parameters(model: PreTrainedModel) -> list[Tensor]:
    """Parameters of the vision tower: those of neither text layers nor head."""
    text = {id(each) for part in (model.get_decoder(), model.get_output_embeddings()) for each in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in text]


def select_tensors(model: PreTrainedModel, part: WeightScope) -> dict[str, Tensor]:
    """The model's own tensors, or the base's, or the adapters', under the names of their files."""
    choose = {"all": PreTrainedModel.state_dict, "base": base_tensors, "adapters": adapter_tensors}
    return choose[part](model)


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor."""
    return hasattr(tensor, "placements")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def to_scalar(tensor: Tensor) -> float:
    """The value of a scalar that may be distributed over ranks."""
    return (tensor.full_tensor() if is_shard(tensor) else tensor).item()
