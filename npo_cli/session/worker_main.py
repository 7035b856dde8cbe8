"""One of several processes: rank 0 runs the command, any other waits for pieces of common work and does its share.

A follower reads no command line, writes no file of the run but its shards, prints nothing unless it fails, and leaves
signals to rank 0, which ends the step, saves, and says when it is over.
"""

import signal
from collections.abc import Callable

from npo_cli.distributed.launch import LaunchInfo
from npo_cli.distributed.process_group import WorkerGroup, lead_workers
from npo_cli.session.partition import WorkerState


def run_leader(place: LaunchInfo, command: Callable[[], int | None]) -> int | None:
    """The command as one process runs it, the others called in where it has heavy work."""
    with lead_workers(place, WorkerState()):
        return command()


def run_worker(place: LaunchInfo) -> None:
    """Until rank 0 has no more work, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    WorkerGroup(place, WorkerState()).serve()
