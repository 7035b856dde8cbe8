"""One of several processes: rank 0 runs the command, any other waits for pieces of common work and does its share.

A follower reads no command line, writes no file of the run but its shards, prints nothing unless it fails, and leaves
signals to rank 0, which ends the step, saves, and says when it is over.
"""

import signal
from collections.abc import Callable

from npo_cli.launched import Place
from npo_cli.policy.team import Team, leading
from npo_cli.stages.shares import Hand


def lead(place: Place, command: Callable[[], int | None]) -> int | None:
    """The command as one process runs it, the others called in where it has heavy work."""
    with leading(place, Hand()):
        return command()


def follow(place: Place) -> None:
    """Until rank 0 has no more work, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Team(place, Hand()).follow()
