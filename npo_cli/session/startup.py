"""What a command spends before it works: starting the process, loading task and weights, starting an engine.

The seconds are measured where they pass, and charged by the command, which knows the branch or artifact that they were
spent for. They belong to the process, so there is one clock; a new session sets it back.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from npo_cli.activity import Activity, report_activity

if TYPE_CHECKING:
    from npo_cli.storage.layout import RunDir

GC_THRESHOLDS = gc.get_threshold()
GC_THRESHOLDS_OF_START = (1_000_000, 50, 100)
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
    """The command begins: until its first session opens, it starts.

    Importing libraries makes some hundred thousand objects that stay: looking for garbage among them takes a fifth of
    the start, so it is done less often until then.
    """
    gc.set_threshold(*GC_THRESHOLDS_OF_START)
    _CLOCK.process_began = time.perf_counter()


def begin_session() -> None:
    """Forget what an earlier session left uncharged; the first session takes the start of the process."""
    _CLOCK.seconds.clear()
    if gc.get_threshold() == GC_THRESHOLDS_OF_START:
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
    if _CLOCK.process_began is not None:
        _CLOCK.seconds["start"] = time.perf_counter() - _CLOCK.process_began
        _CLOCK.process_began = None


@contextmanager
def measure_startup(kind: StartupKind, what: str = "") -> Iterator[None]:
    """Add the seconds of the block, or of the decorated function, without those of blocks inside it.

    `what` was loaded or started: the model, the engine.
    """
    name = f"{kind} {what}".rstrip()
    report_activity(Activity(name=name))
    began, before = time.perf_counter(), sum(_CLOCK.seconds.values())
    yield
    inside = sum(_CLOCK.seconds.values()) - before
    seconds = time.perf_counter() - began - inside
    _CLOCK.seconds[kind] = _CLOCK.seconds.get(kind, 0.0) + seconds
    report_activity(Activity(name=name, seconds=seconds))


def charge_startup(run: RunDir, *, branch: str, step: int, artifact: Path | None = None) -> None:
    """Charge what passed since the last call: to the branch from the step after `step` on, or to an artifact."""
    from npo_cli.storage.costs import append_cost

    for kind, seconds in _CLOCK.seconds.items():
        append_cost(run, kind, branch=branch, step=step, artifact=artifact, seconds=seconds)
    _CLOCK.seconds.clear()


def ignore_deprecations() -> None:
    """Do not show warnings of newer transformers about names that the oldest admitted one needs."""
    warnings.filterwarnings("ignore", _DEPRECATED, FutureWarning)
