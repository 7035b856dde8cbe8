"""Generates reasoning-gym problems in a separate process, so that the same seed always gives the same problems.

Some data sets iterate over Python sets of strings (word_ladder, ransom_note, ...) or use the global random generator
(list_functions). In the trainer's process, with its random hash seed, they would generate other problems at every
start. Here the hash seed is fixed, and the generator is seeded before each problem.
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
"""A data set is exhausted after MIN_PATIENCE + PATIENCE_PER_ENTRY * (entries found) problems without a new one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """One data set of the mixture, and how many distinct problems to take from it."""

    label: str
    name: str
    config: dict[str, Any]
    """From the recipe."""
    seed: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One problem of a data set."""

    label: str
    index: int
    """Its index in the data set."""
    content: dict[str, Any]
    """Question, answer, and what the data set's score_answer needs."""


def generate_entries(specs: Sequence[DatasetSpec]) -> list[list[Entry]]:
    """For each data set its entries in the order of their index. Questions are distinct across all data sets."""
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
    # The pipe closes before the child is waited for, so neither can block the other.
    with child, ours:
        theirs.close()
        try:
            ours.send(specs)
            entries = ours.recv()
        except (EOFError, ConnectionError) as error:
            raise RunFailed(
                f"generating problems with reasoning-gym failed with exit code {child.wait()}",
                "see its output above; npo doctor shows which packages are missing",
            ) from error
    if isinstance(entries, tuple):
        raise NpoError(*entries)
    return entries


def serve_entries(channel_number: int) -> None:
    """In the child: receive the specs, send the entries, or (message, hint) of an error."""
    os.dup2(2, 1)  # what a data set prints goes to stderr: stdout is for the command's output
    with Connection(channel_number) as channel:
        try:
            seen: set[str] = set()
            reply: Any = [_distinct(spec, seen) for spec in channel.recv()]
        except NpoError as error:
            reply = (error.message, error.hint)
        channel.send(reply)


def open_dataset(spec: DatasetSpec) -> Any:
    """The data set of a spec. Its size only limits the index here."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if spec.name not in DATASETS:
        near = get_close_matches(spec.name, DATASETS, n=1, cutoff=0.4)
        raise NpoError(
            f"task.datasets: {spec.name!r} is not a reasoning-gym data set",
            f"did you mean {near[0]}?" if near else f"choose among {', '.join(sorted(DATASETS))}",
        )
    try:
        return create_dataset(spec.name, **{"seed": spec.seed, "size": _max_draws(spec.count), **spec.config})
    except Exception as error:  # data sets raise many kinds
        raise NpoError(
            f"reasoning-gym cannot create {spec.name} with config {spec.config}: {type(error).__name__}: {error}",
            f"fix the config of {spec.name} in task.datasets",
        ) from error


def _distinct(spec: DatasetSpec, seen: set[str]) -> list[Entry]:
    """The first `count` entries with a question that is not in `seen`."""
    dataset = open_dataset(spec)
    entries: list[Entry] = []
    index, last_new = 0, 0
    limit = min(len(dataset), _max_draws(spec.count))
    while len(entries) < spec.count:
        if index >= limit or index - last_new > PATIENCE_PER_ENTRY * len(entries) + MIN_PATIENCE:
            raise _exhausted(spec, found=len(entries), num_draws=index)
        content = _entry_content(dataset, spec, index)
        if content["question"] not in seen:
            seen.add(content["question"])
            entries.append(Entry(label=spec.label, index=index, content=content))
            last_new = index
        index += 1
    return entries


def _entry_content(dataset: Any, spec: DatasetSpec, index: int) -> dict[str, Any]:
    random.seed(f"{spec.seed}:{spec.label}:{index}")
    try:
        return dataset[index]
    except Exception as error:  # data sets raise many kinds
        raise NpoError(
            f"reasoning-gym failed to create problem {index} of {spec.name} with config {spec.config}: "
            f"{type(error).__name__}: {error}",
            f"fix the config of {spec.name} in task.datasets",
        ) from error


def _max_draws(count: int) -> int:
    """Enough to collect all of `count` distinct questions at random, if there are few more than that."""
    return 100 * count + 1000


def _exhausted(spec: DatasetSpec, *, found: int, num_draws: int) -> NpoError:
    return NpoError(
        f"{spec.label} has only {found} distinct questions in {num_draws} problems, but {spec.count} are needed",
        "lower task.pool_size, task.heldout_size or its weight, or make its config more varied",
    )
