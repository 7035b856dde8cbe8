"""The optimizer, its learning-rate schedule as a function of the step, and the training state on disk."""

import json
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Adafactor, AdamW, Optimizer
from transformers import PreTrainedModel

from npo_cli.config.recipe import TrainSettings
from npo_cli.distributed.process_group import current_group, on_main_rank
from npo_cli.errors import NpoError, damaged_checkpoint_hint
from npo_cli.policy.fsdp import is_shard, local_tensor
from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.guides import ReplayBuffer, Success

SCALARS_FILE = "state.json"
STATE_FILE = "optimizer.safetensors"
SHARD_GLOB = "shard-*.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Everything a step needs besides weights, moments and the recipe."""

    step: int
    """Steps done."""
    position: int
    """Data position: prompts drawn since the start of the run."""
    running_metrics: Mapping[str, float]
    """Tokens generated so far, running averages of reward and entropy."""
    failed_prompts: tuple[FailedPrompt, ...] = ()
    """Newest failed prompts, oldest first, which AutoNPO probes."""
    replay_buffer: ReplayBuffer | None = None
    """Past correct rollouts for experience replay; None where the recipe has none."""


def build_optimizer(model: PreTrainedModel, settings: TrainSettings) -> Optimizer:
    """The recipe's optimizer of all trainable parameters; fused on GPUs, which needs no copies of the gradients.

    Adafactor's rate is relative: a step changes a matrix by at most lr times its root mean square (arXiv 1804.04235).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "adafactor":
        return Adafactor(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    fused = True if model.device.type == "cuda" else None
    return AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=fused)


def optimizer_state_shapes(optimizer: Optimizer, parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the optimizer's state of a parameter; `step` is a scalar."""
    shape = tuple(parameter.shape)
    if isinstance(optimizer, AdamW):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if len(shape) < 2:
        return {"step": (), "variance": shape}
    return {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def lr_at(step: int, settings: TrainSettings) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then constant, linear or cosine decay to min_lr_ratio * lr."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    left = settings.num_steps - settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, left))
    share = {
        "constant": 1.0,
        "linear": 1 - (1 - settings.min_lr_ratio) * progress,
        "cosine": settings.min_lr_ratio + (1 - settings.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2,
    }[settings.schedule]
    return settings.lr * share


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def read_random_state() -> tuple[dict[str, Tensor], dict[str, list]]:
    """State of the global random streams: torch's as tensors, Python's and numpy's as JSON."""
    tensors = {"rng.torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    numpy_state = [name, keys.tolist(), position, has_gauss, cached]
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy_state}


def seed_random_state(seed: int) -> None:
    """Seed all global random streams: a saved training state then depends on the run's seed only."""
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def restore_random_state(tensors: Mapping[str, Tensor], scalars: Mapping[str, list]) -> None:
    """Restore the global random streams."""
    torch.set_rng_state(tensors["rng.torch"])
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
    version, words, gauss = scalars["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = scalars["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def save_state(folder: Path, model: PreTrainedModel, optimizer: Optimizer, *, state: TrainerState) -> None:
    """Write the training state into an existing folder; all ranks call it together.

    optimizer.safetensors holds moments by parameter name and random streams, state.json the rest, and sharded moments
    lie in one file per rank.
    """
    moments = read_moments(model, optimizer)
    shards = {name: value for name, value in moments.items() if is_shard(value)}
    whole = {name: value.detach().cpu().contiguous() for name, value in moments.items() if name not in shards}
    streams, scalars = encode_state(state)
    write_state(folder, streams | whole, scalars)
    if shards:
        save_shards(folder, shards)


def read_moments(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's own tensors by `PARAMETER.KEY`."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def encode_state(state: TrainerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random streams as tensors, and what state.json holds."""
    tensors, streams = read_random_state()
    scalars = {
        "step": state.step,
        "position": state.position,
        "running_metrics": dict(state.running_metrics),
        "failed_prompts": [[each.prompt_id, each.step, each.accuracy, each.epoch] for each in state.failed_prompts],
        "rng": streams,
    }
    if state.replay_buffer is not None:
        scalars["replay_buffer"] = asdict(state.replay_buffer)
    return tensors, scalars


@on_main_rank
def write_state(folder: Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write the files of a training state that is not in shards."""
    save_file(tensors, folder / STATE_FILE)
    (folder / SCALARS_FILE).write_text(json.dumps(scalars))


def _read_state(folder: Path, *, moments: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        scalars = json.loads((folder / SCALARS_FILE).read_text(encoding="ascii"))
        return read_full_state(folder) if moments else read_small_tensors(folder, start="rng."), scalars
    except (OSError, ValueError, SafetensorError) as error:
        raise NpoError(
            f"{folder}: the training state cannot be read: {error}", damaged_checkpoint_hint(folder.parent)
        ) from error


def load_state(folder: Path, model: PreTrainedModel, optimizer: Optimizer) -> TrainerState:
    """The reverse of `save_state`, in place, whatever number of ranks wrote it; random streams included."""
    load_moments(folder, model, optimizer)
    tensors, scalars = _read_state(folder, moments=False)
    restore_random_state(tensors, scalars["rng"])
    return _state_of(scalars)


def load_moments(folder: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    """The optimizer's moments alone."""
    if not folder.is_dir():
        raise NpoError(f"there is no {folder} here", "put the run directory on a disk that all processes share")
    is_sharded = any(map(is_shard, model.parameters()))
    tensors = read_shards(model, folder) if is_sharded else _read_state(folder, moments=True)[0]
    restore_moments(folder, tensors, model=model, optimizer=optimizer)


def restore_moments(
    folder: Path, tensors: Mapping[str, Tensor], *, model: PreTrainedModel, optimizer: Optimizer
) -> None:
    """Replace the optimizer's moments by those of this name and shape; refused where they do not fit."""
    has_moments = any(not key.startswith("rng.") for key in tensors)
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        shapes = optimizer_state_shapes(optimizer, parameter)
        state = {key: tensors[f"{name}.{key}"] for key in shapes if f"{name}.{key}" in tensors}
        if has_moments and parameter.requires_grad and state.keys() != shapes.keys():
            raise NpoError(f"{folder}: optimizer state of {name} is missing", damaged_checkpoint_hint(folder.parent))
        if not all(
            value.shape == shapes[key] and torch.isfinite(local_tensor(value)).all() for key, value in state.items()
        ):
            raise NpoError(
                f"{folder}: optimizer state of {name} has another shape or is not finite",
                damaged_checkpoint_hint(folder.parent),
            )
        if state:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }


def read_trainer_state(folder: Path) -> TrainerState:
    """The training state without moments, read without an optimizer."""
    return _state_of(_read_state(folder, moments=False)[1])


def _state_of(scalars: Mapping[str, Any]) -> TrainerState:
    failed = tuple(
        FailedPrompt(prompt_id=prompt_id, step=step, accuracy=accuracy, epoch=epoch)
        for prompt_id, step, accuracy, epoch in scalars.get("failed_prompts", ())
    )
    buffer = scalars.get("replay_buffer")
    return TrainerState(
        step=scalars["step"],
        position=scalars["position"],
        running_metrics=scalars["running_metrics"],
        failed_prompts=failed,
        replay_buffer=None if buffer is None else _decode_replay_buffer(buffer),
    )


def _decode_replay_buffer(saved: Mapping[str, Any]) -> ReplayBuffer:
    def success(row: Mapping[str, Any]) -> Success:
        ids, logps = tuple(row["response_ids"]), tuple(row["behavior_logps"])
        return Success(**{**row, "response_ids": ids, "behavior_logps": logps})

    successes = {name: tuple(map(success, rows)) for name, rows in saved["successes"].items()}
    return ReplayBuffer(**{**saved, "successes": successes})


# Tensor files of a training state


def has_shards(folder: Path) -> bool:
    """Whether several ranks wrote this training state."""
    return any(folder.glob(SHARD_GLOB))


def read_small_tensors(folder: Path, *, start: str = "", end: str = "") -> dict[str, Tensor]:
    """Tensors of optimizer.safetensors whose names begin and end like that; the others are not read."""
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(start) and name.endswith(end)}  # noqa: SIM118


def read_full_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a training state, put together in this process."""
    tensors = load_file(folder / STATE_FILE)
    if has_shards(folder):
        sizes = {name: each for name, each in _sizes(folder).items() if name not in tensors}
        tensors |= _filled(folder, {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in sizes.items()})
    return tensors


def _sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (each.size, each.properties.dtype) for name, each in found.items()}


def _filled(folder: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values from the files into these tensors, whole ones or shards, in place."""
    from torch.distributed import checkpoint

    alone = not any(map(is_shard, wanted.values()))
    with warnings.catch_warnings(), current_group().phase("load the optimizer"):
        # That there is one process only is no news.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        group = None if alone else current_group().torch_group
        checkpoint.load(wanted, storage_reader=reader, no_dist=alone, process_group=group)
    return wanted


def read_shards(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The moments of a sharded model: this rank's part of each."""
    sizes, wanted = _sizes(folder), {}
    for name, parameter in model.named_parameters():
        for key, (size, dtype) in sizes.items():
            if key.rpartition(".")[0] == name and size == parameter.shape:
                wanted[key] = torch.zeros_like(parameter, dtype=dtype)
    # The number of steps of each parameter is not sharded.
    return _filled(folder, wanted) | read_small_tensors(folder, end=".step")


def save_shards(folder: Path, shards: dict[str, Tensor]) -> None:
    """Write this rank's file beside those of the others."""
    from torch.distributed import checkpoint

    with current_group().phase("save the optimizer"):
        checkpoint.save(
            shards,
            storage_writer=checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=current_group().torch_group,
        )
