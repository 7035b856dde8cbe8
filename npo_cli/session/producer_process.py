"""The producer's own side: load the model, then for each job load weights and sample, until the pipe closes."""

import os
import shutil
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file

from npo_cli.config.loading import recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import RunFailed
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


def serve(channel_number: int, lifeline_number: int) -> None:
    """Answer the start when the model is loaded, and each job with its samples."""
    with Connection(channel_number) as channel:
        start: ProducerStart = channel.recv()
        threading.Thread(target=_end_with_learner, args=(lifeline_number, start.folder), daemon=True).start()
        recipe = adapt_recipe(recipe_from_dict(start.recipe))
        policy = load_policy(recipe.model)
        weights = select_weights(policy)
        engine = open_session_engine(recipe, policy, doubles_rank=False)
        policy.model.requires_grad_(False)
        channel.send("ready")
        while True:
            try:
                job: SampleJob = channel.recv()
            except EOFError:
                return
            if job.weights is not None:
                load_published(weights, job.weights)
                policy.mark_weights_changed()
            channel.send(engine.generate(job.requests, temperature=job.temperature, max_new_tokens=job.max_new_tokens))


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
def load_published(own: dict[str, torch.Tensor], weights: PublishedWeights) -> None:
    """Copy published weights into the model's tensors, after a check of names and checksum."""
    tensors = load_file(weights.path)
    if tensors.keys() != own.keys() or compute_checksum(tensors) != weights.crc32:
        raise RunFailed(f"the weights of {weights.version} did not reach the producer as they were sent", RESUME_HINT)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _end_with_learner(lifeline_number: int, folder: Path) -> None:
    """When the other end of the lifeline closes, by `kill -9` too."""
    os.read(lifeline_number, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
