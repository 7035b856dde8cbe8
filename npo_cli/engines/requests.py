"""What an engine is asked and what it answers, whichever engine it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One response wanted."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    slot: int
    seed: int
    """63 bits; the same request with the same weights gets the same response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One response sampled."""

    prompt_id: str
    slot: int
    response_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """At the sampling temperature, under the engine's weights (nats)."""
    mean_entropy: float
    text: str
    """Without the end token."""
    finished: bool


class Engine(Protocol):
    """Anything that samples."""

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample a request, in order."""
