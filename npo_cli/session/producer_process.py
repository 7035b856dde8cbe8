"""The producer's own side: load the model, open the engine, then for each job load weights and sample, until the pipe
closes."""

import os
import secrets
import shutil
import threading
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from npo_cli.config.loading import recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import Sample
from npo_cli.inference.sync_check import RESUME_HINT
from npo_cli.policy.model import load_policy
from npo_cli.session.producer import (
    ProducerStart,
    PublishedWeights,
    SampleJob,
    compute_checksum,
    select_weights,
)
from npo_cli.session.session import open_session_engine
from npo_cli.session.weight_sync import WeightSync


@dataclass(kw_only=True, slots=True)
class Sampler:
    """The model and its engine."""

    weights: dict[str, Tensor]
    """Of the model, as they are published."""
    sync: WeightSync
    version: str = ""
    """Of the weights that the engine holds."""

    def sample(self, job: SampleJob) -> list[Sample]:
        """Load the job's weights, send them to an engine that holds a copy and verify that, then sample."""
        if job.weights is not None:
            load_published(self.weights, job.weights)
            self.sync.policy.mark_weights_changed()
            self.version = self.sync.sync_weights(job.weights.step)
        requests = [replace(request, version=self.version) for request in job.requests]
        return self.sync.engine.generate(requests, temperature=job.temperature, max_new_tokens=job.max_new_tokens)


def serve(channel_number: int, lifeline_number: int) -> None:
    """Answer the start with the engine's reproducibility warning, and each job with its samples; an error is the last
    answer."""
    with Connection(channel_number) as channel:
        start: ProducerStart = channel.recv()
        opened: list[Sampler] = []
        options = (lifeline_number, start.folder, opened)
        guard = threading.Thread(target=_end_with_learner, args=options, daemon=True)
        guard.start()
        try:
            sampler = open_sampler(start)
            opened.append(sampler)
            channel.send(sampler.sync.engine.reproducibility_warning)
            while (job := receive_job(channel)) is not None:
                channel.send(sampler.sample(job))
        except NpoError as error:
            channel.send(error)
        guard.join()


def receive_job(channel: Connection) -> SampleJob | None:
    """The next one; None: the learner has closed the pipe."""
    try:
        return channel.recv()
    except EOFError:
        return None


def open_sampler(start: ProducerStart) -> Sampler:
    """Load the model and open the engine."""
    recipe = adapt_recipe(recipe_from_dict(start.recipe))
    policy = load_policy(recipe.model)
    weights = select_weights(policy)
    engine = open_session_engine(recipe, policy, doubles_rank=False)
    policy.model.requires_grad_(False)
    sync = WeightSync(
        recipe=recipe, policy=policy, engine=engine, check_rows=start.check_rows, run_nonce=secrets.token_hex(4)
    )
    return Sampler(weights=weights, sync=sync)


def adapt_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the producer's threads and device."""
    settings = recipe.engine.producer
    changes = {"gradient_checkpointing": False}
    if settings.threads is not None:
        changes["threads"] = settings.threads
    if settings.device is not None:
        changes["device"] = settings.device
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})


@torch.no_grad()
def load_published(own: dict[str, Tensor], weights: PublishedWeights) -> None:
    """Copy published weights into the model's tensors, after a check of names and checksum."""
    tensors = load_file(weights.path)
    if tensors.keys() != own.keys() or compute_checksum(tensors) != weights.crc32:
        raise RunFailed(f"the weights of {weights.version} did not reach the producer as they were sent", RESUME_HINT)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _end_with_learner(lifeline_number: int, folder: Path, opened: list[Sampler]) -> None:
    """When the learner says so, or the other end of the lifeline closes, by `kill -9` too."""
    os.read(lifeline_number, 1)
    shutil.rmtree(folder, ignore_errors=True)
    for sampler in opened:
        if not sampler.sync.engine.runs_in_trainer:
            sampler.sync.engine.close()
    os._exit(1)
