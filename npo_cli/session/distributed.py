"""What a session does differently on several ranks: which recipes it refuses, sharded policies, and engines.

A policy of one process is left as it is, and its engine is opened directly.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from npo_cli.config.engine import EngineSettings
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.launch import read_launch_info
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.inference.base import Engine, LogprobRequest, ModelHandle, Sample, SampleRequest, open_engine
from npo_cli.policy.device import set_process_device
from npo_cli.policy.fsdp import shard_model
from npo_cli.policy.model import Policy
from npo_cli.policy.packing import TokenRow
from npo_cli.registry import ENGINES
from npo_cli.session.logprob_pass import run_logprob_pass


def prepare_distributed(recipe: Recipe) -> None:
    """Refuse what several ranks cannot do, before anything is loaded; then each rank selects its device."""
    group, launch = current_group(), read_launch_info()
    if group.world_size == 1 or launch is None:
        return
    check_distributed_recipe(recipe, group.world_size)
    set_process_device(launch.local_rank, local_size=launch.local_world_size, requested=recipe.model.device)


def check_distributed_recipe(recipe: Recipe, num_processes: int) -> None:
    """Refuse what `num_processes` ranks cannot do, on any machine."""
    train = recipe.train
    if recipe.uses_extrapolation:
        raise NpoError(
            f"an extrapolated guide holds two whole models in one process, and there are {num_processes} processes",
            "start one process, or set guide.source=cache",
        )
    engine = ENGINES.get(recipe.engine.kind)
    if engine.runs_in_trainer and engine.needs_weight_sync:
        raise NpoError(
            f"engine.kind={engine.name} samples in one process, and there are {num_processes}",
            "engine.kind=vllm_server   # or transformers",
        )
    if recipe.engine.compile:
        raise NpoError(
            f"engine.compile=true compiles the model of one process, and there are {num_processes}",
            "engine.compile=false",
        )
    if train.optimizer == "adafactor":
        raise NpoError("train.optimizer=adafactor is not supported with sharded weights", "train.optimizer=adamw")
    if recipe.engine.vllm.weight_transfer in ("nccl", "ipc"):
        raise NpoError(
            f"engine.vllm.weight_transfer={recipe.engine.vllm.weight_transfer} sends from one GPU, and "
            f"{num_processes} processes hold the weights",
            "engine.vllm.weight_transfer=auto",
        )
    rollouts = train.prompts_per_step * min(train.group_size, recipe.target.group_size or train.group_size)
    if num_processes > rollouts:
        raise NpoError(
            f"{num_processes} processes for {rollouts} rollouts per step",
            "start fewer processes, or raise train.prompts_per_step",
        )


def shard_policy(policy: Policy, recipe: Recipe, *, folder: Path | None) -> Policy:
    """The policy in shards over all ranks, which must have loaded the same files; unchanged without a job."""
    group = current_group()
    if not group.is_launched:
        return policy
    group.configure(deadline=recipe.distributed.timeout, device=policy.device.type)
    digests = group.gather((policy.digest_here, policy.tokenizer_digest), phase="compare the weights")
    for rank, found in enumerate(digests):
        if found != digests[0]:
            what = "weights" if found[1] == digests[0][1] else "a tokenizer"
            raise NpoError(
                f"rank {rank} found other files than rank 0: {what} of {folder or recipe.model.path} that differ",
                "give every machine the same files",
            )
    with group.phase("shard the model"):
        sharding = shard_model(
            policy.model, recipe.distributed, compute_dtype=policy.compute_dtype, torch_group=group.torch_group
        )
        sharded = replace(policy, sharding=sharding)
        # One pass lets FSDP2 find its root before any layer is called by itself.
        with torch.no_grad(), sharding.unshard_weights(sharded.model):
            sharded.score([TokenRow(prompt_ids=(0,), response_ids=(0,))], temperature=1.0, chunk_tokens=1)
    return sharded


class SplitEngine(Engine):
    """Each rank samples its part of the requests with its own engine on the trainer's weights; all get all samples."""

    needs_weight_sync = False

    def __init__(self, engine: Engine, policy: Policy, recipe: Recipe) -> None:
        self.engine, self.policy, self.recipe = engine, policy, recipe

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Nothing is moved."""
        self.engine.update_weights(model, version=version)
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order, with all weights whole: ranks need different numbers of passes."""

        def sample_part(part: Sequence[SampleRequest]) -> list[Sample]:
            sharding = self.policy.sharding
            with nullcontext() if sharding is None else sharding.unshard_weights(self.policy.model):
                return self.engine.generate(part, temperature=temperature, max_new_tokens=max_new_tokens)

        return current_group().map(sample_part, requests, phase="sample")

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """The trainer's own pass: there are no other weights."""
        rows = [
            TokenRow(prompt_ids=each.prompt_ids, response_ids=each.response_ids, images=each.images)
            for each in requests
        ]
        scored = run_logprob_pass(self.policy, self.recipe, rows, temperature=1.0)
        return [tuple(scores.logps_T.tolist()) for scores in scored]


class MainRankEngine(Engine):
    """An engine with weights of its own, such as a server, that rank 0 alone talks to; all ranks get its answers."""

    runs_in_trainer = False

    def __init__(self, settings: EngineSettings, handle: ModelHandle, weights: "GatheredWeights") -> None:
        self.weights, self.engine = weights, None

        def start() -> tuple[int, str]:
            self.engine = open_engine(settings, handle)
            return self.engine.num_versions, self.engine.reproducibility_warning

        weights.gather()
        started = current_group().run_on_main(start, phase="start the engine")
        self.num_versions, self.reproducibility_warning = started

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Weights are gathered by all ranks and sent by rank 0."""
        self.weights.gather()
        self._run(lambda engine: engine.update_weights(self.weights, version=version), phase="send the weights")
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order."""
        return self._run(
            lambda engine: engine.generate(requests, temperature=temperature, max_new_tokens=max_new_tokens),
            phase="sample",
        )

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """Of the engine's weights."""
        return self._run(lambda engine: engine.compute_logps(requests), phase="score with the engine")

    def release_memory(self) -> None:
        """Free the engine's memory."""
        if self.engine is not None:
            self.engine.release_memory()

    def close(self) -> None:
        """End the engine."""
        if self.engine is not None:
            self.engine.close()

    def _run(self, request: Callable[[Any], Any], *, phase: str) -> Any:
        return current_group().run_on_main(lambda: request(self.engine), phase=phase)


class GatheredWeights:
    """A sharded model whose whole tensors, gathered by all ranks, lie in rank 0's memory for an engine there."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._has_base = policy, False
        self.base: dict[str, torch.Tensor] = {}
        self.trained: dict[str, torch.Tensor] = {}
        """The adapters where there are any, else all weights."""

    def gather(self) -> None:
        """Called by all ranks; the base does not change and is gathered once."""
        policy = self._policy
        if policy.adapters is None:
            self.trained = policy.tensors
            return
        if not self._has_base:
            self.base, self._has_base = policy.base_weights, True
        self.trained = policy.adapter_weights

    @property
    def __class__(self) -> type:
        """The model's own."""
        return type(self._policy.model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Rank 0's whole tensors."""
        return self.trained if self._policy.adapters is None else self._policy.model.state_dict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy.model, name)
