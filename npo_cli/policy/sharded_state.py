"""Pieces of common work on the optimiser's moments: each process has those of its shards of the weights.

Knows no format: `moment_files.py` does.
"""

from dataclasses import dataclass
from pathlib import Path

from npo_cli.distributed.process_group import Worker
from npo_cli.errors import NpoError
from npo_cli.policy.checkpoint_state import read_shards, save_shards
from npo_cli.policy.fsdp import is_shard
from npo_cli.policy.optimizer import restore_moments


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveMoments:
    """Every process writes its shards."""

    name: str
    folder: Path
    phase = "save the optimizer"

    def run(self, member: Worker) -> None:
        """One file a process; a run before its first update has nothing to write."""
        _need(self.folder)
        model, optimizer, found = member.models[self.name], member.optimizer, {}
        assert optimizer is not None, "there is an optimiser from the first step on"
        for name, parameter in model.named_parameters():
            kept = optimizer.state.get(parameter, {})
            found |= {f"{name}.{key}": value for key, value in kept.items() if is_shard(value)}
        if found:
            save_shards(self.folder, found)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadMoments:
    """Every process reads its shards, however many wrote them."""

    name: str
    folder: Path
    phase = "load the optimizer"

    def run(self, member: Worker) -> None:
        """The optimiser's state is replaced."""
        _need(self.folder)
        model = member.models[self.name]
        restore_moments(self.folder, read_shards(model, self.folder), model=model, optimizer=member.optimizer)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResetMoments:
    """The optimiser starts afresh."""

    phase = "reset the optimizer"

    def run(self, member: Worker) -> None:
        """No state is left."""
        assert member.optimizer is not None
        member.optimizer.state.clear()


def _need(folder: Path) -> None:
    if not folder.is_dir():
        raise NpoError(f"there is no {folder} here", "put the run directory on a disk that all processes share")
