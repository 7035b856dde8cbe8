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

from npo_cli.config import ModelSettings, Recipe, TrainSettings
from npo_cli.engine_settings import EngineSettings
from npo_cli.engines.requests import Sample, SampleRequest, ScoreRequest
from npo_cli.engines.transformers_engine import TransformersEngine
from npo_cli.errors import NpoError
from npo_cli.launched import place_here
from npo_cli.parallel_settings import DistributedSettings
from npo_cli.policy.devices import settle_device
from npo_cli.policy.logprobs import TokenRow
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.moment_shards import ForgetMoments, LoadMoments, SaveMoments
from npo_cli.policy.optimizer import TrainerState, build_optimizer, load_moments, load_state, load_streams, save_state
from npo_cli.policy.sharding import Shared, shard
from npo_cli.policy.team import team_here
from npo_cli.stages.row_scores import row_scores
from npo_cli.stages.shares import Hand, in_turn

LEARNER, REFERENCE = "policy", "reference"


def refuse_crowd(recipe: Recipe) -> None:
    """What several processes cannot do, said before anything is loaded; then each takes its device."""
    place = place_here()
    if team_here() is None or place is None:
        return
    refuse_many(recipe, place.size)
    settle_device(place.local_rank, local_size=place.local_size, wanted=recipe.model.device)


def refuse_many(recipe: Recipe, size: int) -> None:
    """What `size` processes cannot do, on whatever machine."""
    train = recipe.train
    if recipe.uses_motion:
        raise NpoError(
            f"an extrapolated guide holds two models whole in one process, and there are {size}",
            "start one process; or another guide.source, and autonpo.extrapolate=0",
        )
    if recipe.engine.kind == "vllm":
        raise NpoError(
            f"engine.kind=vllm samples in this process, and there are {size}",
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


def by_disk(engine: EngineSettings, policy: Policy) -> EngineSettings:
    """Weights that were gathered lie in rank 0's CPU memory: a server takes them from the disk."""
    if policy.shared is None:
        return engine
    return engine.model_copy(update={"vllm": engine.vllm.model_copy(update={"weight_transfer": "disk"})})


def shared_among_all(policy: Policy, recipe: Recipe, *, folder: Path | None, name: str = LEARNER) -> Policy:
    """The policy in shards, if this process leads others: they open the same files, which must hold the same."""
    team = team_here()
    if team is None:
        return policy
    team.join(deadline=recipe.distributed.timeout, device=policy.device.type)
    # The others may have been started in another folder.
    opened = Open(name=name, model=recipe.model, folder=folder and folder.absolute(), opened=policy)
    prints = team.work([opened, *[replace(opened, opened=None)] * (team.size - 1)])
    for rank, found in enumerate(prints):
        if found != prints[0]:
            what = "weights" if found[1] == prints[0][1] else "a tokenizer"
            raise NpoError(
                f"rank {rank} found other files than rank 0: {what} of {folder or recipe.model.path} that differ",
                "give every machine the same files",
            )
    team.work_alike(Shard(name=name, settings=recipe.distributed))
    return team.member.policies[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """Load a model, whole."""

    name: str
    model: ModelSettings
    folder: Path | None
    opened: Policy | None
    """Rank 0 has done so already."""
    phase = "open the model"

    def take_part(self, hand: Hand) -> tuple[str, str]:
        """What was found, in two digests."""
        policy = self.opened or load_policy(self.model, self.folder)
        if self.name == REFERENCE:
            policy.model.requires_grad_(False)
        hand.policies[self.name] = policy
        return policy.digest, policy.tokenizer_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Keep only this process's part of an opened model."""

    name: str
    settings: DistributedSettings
    phase = "shard the model"

    def take_part(self, hand: Hand) -> None:
        """In place; one pass lets FSDP2 find its root, before any layer is called on its own."""
        whole, team = hand.policies[self.name], hand.team
        tied = shard(whole.model, self.settings, compute_dtype=whole.compute_dtype, size=team.size)
        shared = Shared(team=team, name=self.name, tied=tied, reshard=self.settings.reshard_after_forward)
        policy = replace(whole, shared=shared)
        hand.models[self.name], hand.policies[self.name] = policy.model, policy
        with torch.no_grad(), shared.gathered(policy.model):
            policy.score([TokenRow(prompt_ids=(0,), response_ids=(0,))], temperature=1.0, chunk_tokens=1)


class SharedEngine:
    """transformers' sampling by all processes, a share of the requests each."""

    holds_copy = False
    num_versions = 1
    remark = ""

    def __init__(self, policy: Policy, recipe: Recipe) -> None:
        assert policy.shared is not None
        self.policy, self.recipe = policy, recipe
        self.name, self.team = policy.shared.name, policy.shared.team
        self.version: str | None = None

    def take_weights(self, model: Any, *, version: str) -> None:
        """Nothing is moved: what the trainer changes is what samples."""
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample a request, in order."""
        pieces = [
            SampleShare(
                name=self.name,
                requests=share,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                max_rows=self.recipe.engine.max_num_seqs,
            )
            for share in in_turn(requests, self.team.size)
        ]
        return [sample for share in self.team.work(pieces) for sample in share]

    def score(self, asked: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        """The trainer's own pass: there are no other weights."""
        rows = [
            TokenRow(prompt_ids=each.prompt_ids, response_ids=each.response_ids, images=each.images) for each in asked
        ]
        scored = row_scores(self.policy, self.recipe, rows, temperature=1.0)
        return [tuple(scores.logps_T.tolist()) for scores in scored]

    def rest(self) -> None:
        """It keeps nothing between two batches."""

    def close(self) -> None:
        """There is nothing to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShare:
    """One process's share of the requests."""

    name: str
    requests: Sequence[SampleRequest]
    temperature: float
    max_new_tokens: int
    max_rows: int
    phase = "sample"

    def take_part(self, hand: Hand) -> list[Sample]:
        """With all weights whole: answers differ in length, so the processes make other numbers of passes."""
        policy = hand.policies[self.name]
        engine = TransformersEngine(
            policy.model,
            policy.tokenizer,
            eos_ids=policy.eos_ids,
            pad_id=policy.pad_id,
            max_rows=self.max_rows,
            dtype=policy.compute_dtype,
            sight=policy.vision,
        )
        assert policy.shared is not None
        with policy.shared.gathered(policy.model):
            return engine.generate(self.requests, temperature=self.temperature, max_new_tokens=self.max_new_tokens)


# The optimiser


@dataclass(frozen=True, kw_only=True, slots=True)
class NewOptimizer:
    """An optimiser of this process's shards, without a past."""

    name: str
    settings: TrainSettings
    phase = "make an optimizer"

    def take_part(self, hand: Hand) -> None:
        """In place of the one before."""
        hand.optimizer = build_optimizer(hand.models[self.name], self.settings)


def new_optimizer(policy: Policy, settings: TrainSettings) -> Optimizer:
    """An optimiser without a past."""
    if policy.shared is None:
        return build_optimizer(policy.model, settings)
    team = policy.shared.team
    team.work_alike(NewOptimizer(name=policy.shared.name, settings=settings))
    return team.member.optimizer


def save_training_state(folder: Path, policy: Policy, optimizer: Optimizer, *, state: TrainerState) -> None:
    """Everything but the weights, into an existing folder."""
    save_state(folder, policy.model, optimizer, state=state)
    if policy.shared is not None:
        policy.shared.team.work_alike(SaveMoments(name=policy.shared.name, folder=folder.absolute()))


def load_training_state(folder: Path, policy: Policy, optimizer: Optimizer) -> TrainerState:
    """The reverse, in place, whatever number of processes wrote it."""
    if policy.shared is None:
        return load_state(folder, policy.model, optimizer)
    policy.shared.team.work_alike(LoadMoments(name=policy.shared.name, folder=folder.absolute()))
    return load_streams(folder)


def replace_moments(policy: Policy, optimizer: Optimizer, folder: Path | None) -> None:
    """The optimiser's moments alone: those of a training state, or none."""
    if policy.shared is not None:
        name = policy.shared.name
        piece = ForgetMoments() if folder is None else LoadMoments(name=name, folder=folder.absolute())
        policy.shared.team.work_alike(piece)
    elif folder is None:
        optimizer.state.clear()
    else:
        load_moments(folder, policy.model, optimizer)
