"""Checkpoints of other trainers: which folder is which step, and how their files are imported.

Nothing in their folders is changed. Supported, by folder names: transformers and TRL, verl, prime-rl
(docs/how-to/import-from-trl-verl.md). Weights are safetensors, or shards that are read without running their pickles.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from npo_cli.errors import NpoError, quote_path
from npo_cli.interop.sharded_weights import DCP_METADATA, find_rank_files, read_dcp_weights, read_rank_weights
from npo_cli.policy.weights_io import read_tensors
from npo_cli.storage.layout import RUN_INFO_FILE

ADAPTER_CONFIG = "adapter_config.json"
TRAINER_STATE_FILE = "trainer_state.json"
METRICS_FILE = "metrics.jsonl"
MODEL_FILE_SUFFIXES = frozenset({".json", ".model", ".txt", ".jinja", ".tiktoken"})
"""Suffixes of the files of a model besides its weights: config, tokenizer, chat template."""

WeightFormat = Literal["model folder", "adapters", "safetensors", "dcp", "rank files"]
"""`safetensors`: weights without a config; `dcp`: torch.distributed.checkpoint; `rank files`: verl's, one per rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerCheckpoint:
    """A checkpoint that another trainer left."""

    trainer: str
    step: int
    path: Path
    """The folder with the weights."""
    format: WeightFormat

    @property
    def is_adapter(self) -> bool:
        """It holds adapters; the base model is elsewhere."""
        return self.format == "adapters"

    @property
    def is_bare(self) -> bool:
        """It holds tensors alone: config and tokenizer are elsewhere."""
        return self.format in ("safetensors", "dcp", "rank files")

    def read_bare_weights(self) -> dict[str, Tensor]:
        """Whole tensors by name."""
        readers = {"safetensors": read_tensors, "dcp": read_dcp_weights, "rank files": read_rank_weights}
        return readers[self.format](self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusableCheckpoint:
    """A folder that is named like a checkpoint and cannot be read as it is."""

    path: Path
    reason: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointLayout:
    """How one trainer names its checkpoints."""

    trainer: str
    parent_folders: tuple[str, ...]
    """Folders in which they lie, relative to the given one."""
    folder_pattern: re.Pattern[str]
    model_folders: tuple[str, ...]
    """Where the model is in such a folder; the first that holds one is used."""


CHECKPOINT_LAYOUTS = (
    CheckpointLayout(
        trainer="transformers or TRL",
        parent_folders=("",),
        folder_pattern=re.compile(r"checkpoint-(\d{1,6})"),
        model_folders=("", "pytorch_model_fsdp_0"),
    ),
    CheckpointLayout(
        trainer="verl",
        parent_folders=("",),
        folder_pattern=re.compile(r"global_step_(\d{1,6})"),
        model_folders=("actor/huggingface", "actor/model/huggingface", "actor/lora_adapter", "actor"),
    ),
    CheckpointLayout(
        trainer="prime-rl",
        parent_folders=("weights", "checkpoints", "", "broadcasts"),
        folder_pattern=re.compile(r"step_(\d{1,6})"),
        model_folders=("", "trainer"),
    ),
)


def find_trainer_checkpoints(home: Path) -> tuple[list[TrainerCheckpoint], list[UnusableCheckpoint]]:
    """Checkpoints of one trainer by step, and those that cannot be read, each with the reason."""
    if not home.is_dir():
        raise NpoError(f"there is no folder {home}", "--import FOLDER: the output folder of another trainer")
    _check_not_a_run(home)
    for layout in CHECKPOINT_LAYOUTS:
        for above in layout.parent_folders:
            found = list(_match_folders(home / above, layout))
            if found:
                return _classify(found, layout)
    expected = "checkpoint-N, global_step_N/actor, checkpoints/step_N, weights/step_N or step_N"
    single = any(layout.folder_pattern.fullmatch(home.absolute().name) for layout in CHECKPOINT_LAYOUTS)
    fix = f"--import {quote_path(home.absolute().parent)}" if single else "--import FOLDER: the one that holds them"
    raise NpoError(f"{home} holds no checkpoints of another trainer: no {expected}", fix)


def _check_not_a_run(home: Path) -> None:
    """Checkpoints of npo need no import."""
    for folder in (home, *home.absolute().parents):
        if (folder / RUN_INFO_FILE).is_file():
            raise NpoError(f"{home} belongs to the npo run {folder}", f"npo index {quote_path(folder)}")


def _match_folders(home: Path, layout: CheckpointLayout) -> Iterator[tuple[int, Path]]:
    for folder in home.iterdir() if home.is_dir() else ():
        match = layout.folder_pattern.fullmatch(folder.name)
        if match and folder.is_dir():
            yield int(match.group(1)), folder


def _classify(
    named: list[tuple[int, Path]], layout: CheckpointLayout
) -> tuple[list[TrainerCheckpoint], list[UnusableCheckpoint]]:
    found, unusable = [], []
    # Newer releases of prime-rl mark complete checkpoints.
    marked = layout.trainer == "prime-rl" and any((folder / "STABLE").exists() for _, folder in named)
    for step, folder in sorted(named):
        places = [(folder / place, _find_format(folder / place)) for place in layout.model_folders]
        model, kind = next(((place, kind) for place, kind in places if kind), (None, None))
        if model is None or kind is None or (marked and not (folder / "STABLE").exists()):
            unusable.append(_explain_unusable(folder, unmarked=model is not None))
        else:
            found.append(TrainerCheckpoint(trainer=layout.trainer, step=step, path=model, format=kind))
    return found, unusable


def _find_format(folder: Path) -> WeightFormat | None:
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapters" if (folder / "adapter_model.safetensors").is_file() else None
    if any(folder.glob("model*.safetensors")):
        return "model folder" if (folder / "config.json").is_file() else "safetensors"
    if (folder / DCP_METADATA).is_file():
        return "dcp"
    return "rank files" if find_rank_files(folder) else None


def _explain_unusable(folder: Path, *, unmarked: bool) -> UnusableCheckpoint:
    """The reason, and the other trainer's own command where it has one."""
    actor = folder / "actor"
    if any(actor.rglob("dist_ckpt")):
        merge = f"python -m verl.model_merger merge --backend megatron --local_dir {quote_path(actor)}"
        reason = "its weights are in Megatron's shards and not merged"
        fix = f"{merge} --target_dir {quote_path(actor / 'huggingface')}"
    elif any(actor.glob("model_world_size_*.pt")):
        reason, fix = "files of some ranks are missing", "copy actor/model_world_size_W_rank_R.pt of every rank R"
    elif unmarked:
        reason, fix = "it was not finished: it has no STABLE", "let prime-rl finish it"
    elif any(folder.rglob("*.bin")):
        reason = "its weights are pickled, and a pickle may run code"
        fix = "save it again as safetensors (save_pretrained in transformers)"
    else:
        reason, fix = "it holds no model*.safetensors and no complete shards", "let its trainer finish it"
    return UnusableCheckpoint(path=folder, reason=reason, fix=fix)


def link_model_files(source: Path, target: Path) -> None:
    """Config and tokenizer as copies, weights as hard links (as copies where the file system is another).

    A link takes no space and survives when the other trainer deletes its file.
    """
    for path in sorted(source.glob("model*.safetensors")):
        _link(path.resolve(), target / path.name)
    copy_model_settings(source, target)


def copy_model_settings(source: Path, target: Path) -> None:
    """Config, tokenizer and chat template; nothing if the folder is not there."""
    for path in sorted(source.glob("*")):
        if path.is_file() and path.suffix in MODEL_FILE_SUFFIXES and path.name != TRAINER_STATE_FILE:
            shutil.copyfile(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or a file of another user
        shutil.copyfile(source, target)


def find_trainer_metrics(found: list[TrainerCheckpoint], home: Path) -> Path | None:
    """The log of that trainer: the newest trainer_state.json, or prime-rl's metrics.jsonl."""
    candidates = [
        found[-1].path / TRAINER_STATE_FILE,
        found[-1].path.parent / TRAINER_STATE_FILE,
        home / TRAINER_STATE_FILE,
        home / METRICS_FILE,
        home.parent / METRICS_FILE,
    ]
    return next((path for path in candidates if path.is_file()), None)
