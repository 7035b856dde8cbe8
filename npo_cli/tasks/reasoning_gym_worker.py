"""Draws problems from reasoning-gym in a process of its own, so that the same seed always gives the same pool.

Some of its data sets walk over Python sets of strings (word_ladder, ransom_note, ...) or use the global random
generator (list_functions): in the trainer's process, whose hash seed is random, they give other problems at every
start, and no run could be resumed exactly. Here the hash seed is fixed and the generator is seeded before each draw.
"""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from npo_cli.errors import NpoError, RunFailed

PATIENCE_PER_ENTRY = 5
MIN_PATIENCE = 200
"""A data set is exhausted after this many draws, plus PATIENCE_SHARE times those found, without a new question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """How many different problems to take from one data set."""

    label: str
    name: str
    config: dict[str, Any]
    """As the recipe has it."""
    seed: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One problem as the data set made it."""

    label: str
    index: int
    """Its index in the data set."""
    content: dict[str, Any]
    """question, answer and whatever score_answer wants to see again."""


def generate_entries(draws: Sequence[DatasetSpec]) -> list[list[Entry]]:
    """For each draw its entries in the order of their index; no question comes twice, in whatever data set."""
    ours, theirs = Pipe()
    code = f"from npo_cli.tasks.reasoning_gym_worker import serve_entries; serve_entries({theirs.fileno()})"
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path}
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    # The pipe closes before the child is waited for, so that neither can hang on the other.
    with child, ours:
        theirs.close()
        try:
            ours.send(draws)
            drawn = ours.recv()
        except (EOFError, ConnectionError) as error:
            raise RunFailed(
                f"drawing problems from reasoning-gym ended with exit code {child.wait()}",
                "what it said is above; npo doctor shows which packages are missing",
            ) from error
    if isinstance(drawn, tuple):
        raise NpoError(*drawn)
    return drawn


def serve_entries(channel_number: int) -> None:
    """In the child: draws come down the pipe, their entries go back, or (message, hint) for the user to mend."""
    os.dup2(2, 1)  # stdout belongs to the command's data, whatever a data set prints
    with Connection(channel_number) as channel:
        try:
            seen: set[str] = set()
            reply: Any = [_distinct(draw, seen) for draw in channel.recv()]
        except NpoError as error:
            reply = (error.message, error.hint)
        channel.send(reply)


def open_dataset(draw: DatasetSpec) -> Any:
    """The data set of a draw. Its size only bounds indices here, and grows with what is asked."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if draw.name not in DATASETS:
        near = get_close_matches(draw.name, DATASETS, n=1, cutoff=0.4)
        raise NpoError(
            f"task.datasets names {draw.name!r}, which reasoning-gym does not have",
            f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(DATASETS))}",
        )
    try:
        return create_dataset(draw.name, **{"seed": draw.seed, "size": _max_draws(draw.count), **draw.config})
    except Exception as error:  # whatever a data set raises about its own settings
        raise NpoError(
            f"reasoning-gym does not make {draw.name} with config {draw.config}: {type(error).__name__}: {error}",
            f"mend the config of {draw.name} in task.datasets",
        ) from error


def _distinct(draw: DatasetSpec, seen: set[str]) -> list[Entry]:
    """The first `count` entries whose question was not seen yet."""
    dataset = open_dataset(draw)
    entries: list[Entry] = []
    index, last_new = 0, 0
    limit = min(len(dataset), _max_draws(draw.count))
    while len(entries) < draw.count:
        if index >= limit or index - last_new > PATIENCE_PER_ENTRY * len(entries) + MIN_PATIENCE:
            raise _exhausted(draw, found=len(entries), num_draws=index)
        content = _entry_content(dataset, draw, index)
        if content["question"] not in seen:
            seen.add(content["question"])
            entries.append(Entry(label=draw.label, index=index, content=content))
            last_new = index
        index += 1
    return entries


def _entry_content(dataset: Any, draw: DatasetSpec, index: int) -> dict[str, Any]:
    random.seed(f"{draw.seed}:{draw.label}:{index}")
    try:
        return dataset[index]
    except Exception as error:  # whatever a data set raises about its own settings
        raise NpoError(
            f"reasoning-gym failed to make {draw.name} number {index} with config {draw.config}: "
            f"{type(error).__name__}: {error}",
            f"mend the config of {draw.name} in task.datasets",
        ) from error


def _max_draws(count: int) -> int:
    """Enough to collect `count` different questions out of little more than as many, each drawn at random."""
    return 100 * count + 1000


def _exhausted(draw: DatasetSpec, *, found: int, num_draws: int) -> NpoError:
    return NpoError(
        f"{draw.label} gave only {found} different questions in {num_draws} draws, {draw.count} are needed",
        "lower task.pool_size, task.heldout_size or its weight, or widen its config",
    )
