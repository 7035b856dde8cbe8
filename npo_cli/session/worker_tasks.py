"""What rank 0 asks the other processes for: to open a model, to sample, to hold an optimiser.

A stage calls these where it would do the work itself; with one process they do just that. Update and forward passes are
cut up where they are made (`update.py`, `row_scores.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from npo_cli.config.engine import EngineSettings
from npo_cli.config.recipe import DistributedSettings, ModelSettings, Recipe, TrainSettings
from npo_cli.distributed.launch import read_launch_info
from npo_cli.distributed.process_group import current_worker_group
from npo_cli.errors import NpoError
from npo_cli.inference.base import Engine, LogprobRequest, Sample, SampleRequest
from npo_cli.inference.transformers_engine import TransformersEngine
from npo_cli.policy.device import set_process_device
from npo_cli.policy.fsdp import ShardingContext, shard_model
from npo_cli.policy.logprobs import TokenRow
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.optimizer import (
    TrainerState,
    build_optimizer,
    load_moments,
    load_state,
    load_state_without_moments,
    save_state,
)
from npo_cli.policy.sharded_state import LoadMoments, ResetMoments, SaveMoments
from npo_cli.registry import ENGINES
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.partition import WorkerState, partition_contiguous

LEARNER, REFERENCE = "policy", "reference"


def prepare_distributed(recipe: Recipe) -> None:
    """What several processes cannot do, said before anything is loaded; then each takes its device."""
    place = read_launch_info()
    if current_worker_group() is None or place is None:
        return
    check_distributed_recipe(recipe, place.world_size)
    set_process_device(place.local_rank, local_size=place.local_world_size, requested=recipe.model.device)


def check_distributed_recipe(recipe: Recipe, size: int) -> None:
    """What `size` processes cannot do, on whatever machine."""
    train = recipe.train
    if recipe.uses_motion:
        raise NpoError(
            f"an extrapolated guide holds two models whole in one process, and there are {size}",
            "start one process; or another guide.source, and autonpo.extrapolate=0",
        )
    engine: type[Engine] = ENGINES.get(recipe.engine.kind)
    if engine.runs_in_trainer and engine.needs_weight_sync:
        raise NpoError(
            f"engine.kind={engine.name} samples in this process, and there are {size}",
            "engine.kind=vllm_server   # or transformers",
        )
    if train.optimizer == "adafactor":
        raise NpoError(
            "train.optimizer=adafactor sums over rows and columns of whole matrices, and here they are in shards",
            "train.optimizer=adamw",
        )
    if recipe.engine.vllm.weight_transfer in ("nccl", "ipc"):
        raise NpoError(
            f"engine.vllm.weight_transfer={recipe.engine.vllm.weight_transfer} sends from one GPU, and {size} hold the "
            "weights",
            "engine.vllm.weight_transfer=auto",
        )
    if size > train.prompts_per_step * train.group_size:
        raise NpoError(
            f"{size} processes for {train.prompts_per_step * train.group_size} rollouts a step",
            "start fewer processes, or raise train.prompts_per_step",
        )


def with_disk_transport(engine: EngineSettings, policy: Policy) -> EngineSettings:
    """Weights that were gathered lie in rank 0's CPU memory: a server takes them from the disk."""
    if policy.shared is None:
        return engine
    return engine.model_copy(update={"vllm": engine.vllm.model_copy(update={"weight_transfer": "disk"})})


def shard_across_workers(policy: Policy, recipe: Recipe, *, folder: Path | None, name: str = LEARNER) -> Policy:
    """The policy in shards, if this process leads others: they open the same files, which must hold the same."""
    team = current_worker_group()
    if team is None:
        return policy
    team.join(deadline=recipe.distributed.timeout, device=policy.device.type)
    # The others may have been started in another folder.
    opened = OpenModel(name=name, model=recipe.model, folder=folder and folder.absolute(), loaded_policy=policy)
    prints = team.scatter([opened, *[replace(opened, loaded_policy=None)] * (team.world_size - 1)])
    for rank, found in enumerate(prints):
        if found != prints[0]:
            what = "weights" if found[1] == prints[0][1] else "a tokenizer"
            raise NpoError(
                f"rank {rank} found other files than rank 0: {what} of {folder or recipe.model.path} that differ",
                "give every machine the same files",
            )
    team.broadcast(ShardModel(name=name, settings=recipe.distributed))
    return team.worker.policies[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenModel:
    """Load a model, whole."""

    name: str
    model: ModelSettings
    folder: Path | None
    loaded_policy: Policy | None
    """Rank 0 has done so already."""
    phase = "open the model"

    def run(self, hand: WorkerState) -> tuple[str, str]:
        """What was found, in two digests."""
        policy = self.loaded_policy or load_policy(self.model, self.folder)
        if self.name == REFERENCE:
            policy.model.requires_grad_(False)
        hand.policies[self.name] = policy
        return policy.digest, policy.tokenizer_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardModel:
    """Keep only this process's part of an opened model."""

    name: str
    settings: DistributedSettings
    phase = "shard the model"

    def run(self, hand: WorkerState) -> None:
        """In place; one pass lets FSDP2 find its root, before any layer is called on its own."""
        whole, team = hand.policies[self.name], hand.worker_group
        tied = shard_model(whole.model, self.settings, compute_dtype=whole.compute_dtype, size=team.world_size)
        shared = ShardingContext(
            worker_group=team, name=self.name, tied=tied, reshard_after_forward=self.settings.reshard_after_forward
        )
        policy = replace(whole, shared=shared)
        hand.models[self.name], hand.policies[self.name] = policy.model, policy
        with torch.no_grad(), shared.unshard_weights(policy.model):
            policy.score([TokenRow(prompt_ids=(0,), response_ids=(0,))], temperature=1.0, chunk_tokens=1)


class DistributedEngine(Engine):
    """transformers' sampling by all processes, a share of the requests each."""

    needs_weight_sync = False

    def __init__(self, policy: Policy, recipe: Recipe) -> None:
        assert policy.shared is not None
        self.policy, self.recipe = policy, recipe
        self.name, self.worker_group = policy.shared.name, policy.shared.worker_group
        self.version: str | None = None

    def update_weights(self, model: Any, *, version: str) -> None:
        """Nothing is moved: what the trainer changes is what samples."""
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample a request, in order."""
        pieces = [
            SampleShard(
                name=self.name,
                requests=share,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                max_rows=self.recipe.engine.max_num_seqs,
            )
            for share in partition_contiguous(requests, self.worker_group.world_size)
        ]
        return [sample for share in self.worker_group.scatter(pieces) for sample in share]

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """The trainer's own pass: there are no other weights."""
        rows = [
            TokenRow(prompt_ids=each.prompt_ids, response_ids=each.response_ids, images=each.images)
            for each in requests
        ]
        scored = run_logprob_pass(self.policy, self.recipe, rows, temperature=1.0)
        return [tuple(scores.logps_T.tolist()) for scores in scored]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShard:
    """One process's share of the requests."""

    name: str
    requests: Sequence[SampleRequest]
    temperature: float
    max_new_tokens: int
    max_rows: int
    phase = "sample"

    def run(self, hand: WorkerState) -> list[Sample]:
        """With all weights whole: answers differ in length, so the processes make other numbers of passes."""
        policy = hand.policies[self.name]
        engine = TransformersEngine(
            policy.model,
            policy.tokenizer,
            eos_ids=policy.eos_ids,
            pad_id=policy.pad_id,
            max_rows=self.max_rows,
            dtype=policy.compute_dtype,
            vision=policy.vision,
        )
        assert policy.shared is not None
        with policy.shared.unshard_weights(policy.model):
            return engine.generate(self.requests, temperature=self.temperature, max_new_tokens=self.max_new_tokens)


# The optimiser


@dataclass(frozen=True, kw_only=True, slots=True)
class CreateOptimizer:
    """An optimiser of this process's shards, without a past."""

    name: str
    settings: TrainSettings
    phase = "make an optimizer"

    def run(self, hand: WorkerState) -> None:
        """In place of the one before."""
        hand.optimizer = build_optimizer(hand.models[self.name], self.settings)


def create_optimizer(policy: Policy, settings: TrainSettings) -> Optimizer:
    """An optimiser without a past."""
    if policy.shared is None:
        return build_optimizer(policy.model, settings)
    team = policy.shared.worker_group
    team.broadcast(CreateOptimizer(name=policy.shared.name, settings=settings))
    return team.worker.optimizer


def save_training_state(folder: Path, policy: Policy, optimizer: Optimizer, *, state: TrainerState) -> None:
    """Everything but the weights, into an existing folder."""
    save_state(folder, policy.model, optimizer, state=state)
    if policy.shared is not None:
        policy.shared.worker_group.broadcast(SaveMoments(name=policy.shared.name, folder=folder.absolute()))


def load_training_state(folder: Path, policy: Policy, optimizer: Optimizer) -> TrainerState:
    """The reverse, in place, whatever number of processes wrote it."""
    if policy.shared is None:
        return load_state(folder, policy.model, optimizer)
    policy.shared.worker_group.broadcast(LoadMoments(name=policy.shared.name, folder=folder.absolute()))
    return load_state_without_moments(folder)


def replace_moments(policy: Policy, optimizer: Optimizer, folder: Path | None) -> None:
    """The optimiser's moments alone: those of a training state, or none."""
    if policy.shared is not None:
        name = policy.shared.name
        piece = ResetMoments() if folder is None else LoadMoments(name=name, folder=folder.absolute())
        policy.shared.worker_group.broadcast(piece)
    elif folder is None:
        optimizer.state.clear()
    else:
        load_moments(folder, policy.model, optimizer)
