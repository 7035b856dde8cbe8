"""What a command spends before it works: starting the process, loading task and weights, starting an engine.

The seconds are measured where they pass, and charged by the command, which knows the branch or artifact that they were
spent for. They belong to the process, so there is one clock; a new session sets it back.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from npo_cli.storage.layout import RunDir

StartupKind = Literal["load", "start"]
_DEPRECATED = r"`(past_key_values|is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
"""Warnings of newer transformers about names that the oldest admitted one needs."""


@dataclass(slots=True)
class StartupClock:
    """Seconds that were not charged yet."""

    process_began: float | None = None
    """When the command began; None once a session has taken it, and in a program that uses npo as a library."""
    seconds: dict[StartupKind, float] = field(default_factory=dict)


_CLOCK = StartupClock()


def begin_process() -> None:
    """The command begins: until its first session opens, it starts."""
    _CLOCK.process_began = time.perf_counter()


def begin_session() -> None:
    """Forget what an earlier session left uncharged; the first session takes the start of the process."""
    _CLOCK.seconds.clear()
    if _CLOCK.process_began is not None:
        _CLOCK.seconds["start"] = time.perf_counter() - _CLOCK.process_began
        _CLOCK.process_began = None


@contextmanager
def measure_startup(kind: StartupKind) -> Iterator[None]:
    """Add the seconds of the block, or of the decorated function, without those of blocks inside it."""
    began, before = time.perf_counter(), sum(_CLOCK.seconds.values())
    yield
    inside = sum(_CLOCK.seconds.values()) - before
    _CLOCK.seconds[kind] = _CLOCK.seconds.get(kind, 0.0) + time.perf_counter() - began - inside


def charge_startup(run: RunDir, *, branch: str, step: int, artifact: Path | None = None) -> None:
    """Charge what passed since the last call: to the branch from the step after `step` on, or to an artifact."""
    from npo_cli.storage.costs import append_cost

    for kind, seconds in _CLOCK.seconds.items():
        append_cost(run, kind, branch=branch, step=step, artifact=artifact, seconds=seconds)
    _CLOCK.seconds.clear()


def ignore_deprecations() -> None:
    """Do not show warnings of newer transformers about names that the oldest admitted one needs."""
    warnings.filterwarnings("ignore", _DEPRECATED, FutureWarning)
