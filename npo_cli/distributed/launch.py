"""The environment variables by which a launcher (torchrun, accelerate launch, srun) starts one of several processes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from npo_cli.errors import NpoError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchInfo:
    """This process among those of its job."""

    rank: int
    """Rank 0 writes files and prints."""
    world_size: int
    """Processes of the job, on all machines."""
    local_rank: int
    """Rank among the processes of this machine."""
    local_world_size: int


def read_launch_info() -> LaunchInfo | None:
    """This process's ranks; None without a launcher or in a job of one process."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return None
    rank, size = _number("RANK", "0"), _number("WORLD_SIZE", "1")
    local_rank = _number("LOCAL_RANK", str(rank))
    local_size = _number("LOCAL_WORLD_SIZE", str(size))
    missing = [name for name in RENDEZVOUS_VARIABLES if name not in os.environ]
    if missing or not 0 <= rank < size or not 0 <= local_rank < local_size:
        wrong = f"{missing[0]} is missing" if missing else f"RANK={rank} of WORLD_SIZE={size} is impossible"
        raise NpoError(
            f"the environment describes several processes, but {wrong}",
            "torchrun --nproc-per-node N -m npo_cli ..., or for one process: unset RANK WORLD_SIZE",
        )
    return LaunchInfo(rank=rank, world_size=size, local_rank=local_rank, local_world_size=local_size)


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise NpoError(f"{name}={text!r} in the environment is not a whole number", f"unset {name}")
    return int(text)


def strip_launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program outside the job, such as a server."""
    ours = {*RANK_VARIABLES, *RENDEZVOUS_VARIABLES, "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"}
    launcher_prefixes = ("TORCHELASTIC_",)
    return {
        name: value
        for name, value in environment.items()
        if name not in ours and not name.startswith(launcher_prefixes)
    }
