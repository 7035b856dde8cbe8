"""What is sent to an engine with weights of its own, and the proof that it holds it.

Two silent failures are known of vLLM 0.32: a tied head keeps its old weights, and a tensor that was never sent is only
warned of. So the names are compared before, and after every sync both sides score one fixed probe.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.errors import RunFailed

TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean |engine - trainer| in nats a token, for the same weights: some fifty and ten times what was measured."""
SURE = 4.0
"""Standard errors between the old weights and the new before a probe may say which of them the engine holds."""
RESUME = "nothing was lost: `npo resume RUN` goes on from the last checkpoint"

Row = tuple[float, ...]


def named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor under its Hugging Face name, the head under its own even where it is tied to the embedding."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            tensors.setdefault(f"{name}.weight", head.weight.detach())
    return tensors


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_other_names(expected: Mapping[str, tuple[int, ...]], offered: Mapping[str, Tensor]) -> None:
    """The tensors that the engine was started with, no fewer, no others, in the same shapes, all of them finite."""
    shapes = shapes_of(offered)
    findings = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown to the engine": sorted(shapes.keys() - expected.keys()),
        "of another shape": sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]),
        "not finite": sorted(name for name, tensor in offered.items() if not torch.isfinite(tensor).all()),
    }
    for what, names in findings.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise RunFailed(f"weights were not sent to the engine: tensor {what}: {shown}", RESUME)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """One probe scored by both sides, with the trainer's scores of the weights before as a third opinion."""

    engine: Sequence[Row]
    trainer: Sequence[Row]
    before: Sequence[Row] | None
    """The trainer's scores of the weights that the engine held until now; None for the first sync."""

    @property
    def mean_gap(self) -> float:
        """Mean |engine - trainer| over all tokens, nats; a value that is no number counts as infinite."""
        gaps = [abs(a - b) for a, b in self._pairs(self.trainer)]
        return math.inf if any(map(math.isnan, gaps)) else sum(gaps) / len(gaps)

    @property
    def max_gap(self) -> float:
        """Largest |engine - trainer|."""
        return max(abs(a - b) for a, b in self._pairs(self.trainer))

    @property
    def stale(self) -> bool:
        """Whether the engine is nearer to the weights before, where the two are far enough apart to tell.

        With noise of deviation s a token, sum (e - new)^2 - sum (e - old)^2 is -d +- 2 s sqrt(d) for new weights and
        d +- 2 s sqrt(d) for old ones, d = sum (new - old)^2. It decides where sqrt(d) >= 2 SURE s, s being the
        smaller of the two distances.
        """
        if self.before is None:
            return False
        new = sum((a - b) ** 2 for a, b in self._pairs(self.trainer))
        old = sum((a - b) ** 2 for a, b in self._pairs(self.before))
        rows = zip(self.trainer, self.before, strict=True)
        moved = [a - b for row, was in rows for a, b in zip(row, was, strict=True)]
        noise = math.sqrt(min(new, old) / len(moved))
        return old < new and math.sqrt(sum(each * each for each in moved)) >= 2 * SURE * noise

    def _pairs(self, other: Sequence[Row]) -> list[tuple[float, float]]:
        rows = zip(self.engine, other, strict=True)
        return [pair for mine, theirs in rows for pair in zip(mine, theirs, strict=True)]


def refuse_disagreement(found: Agreement, *, tolerance: float, version: str) -> None:
    """Stop where the engine does not score the probe as the weights it was given do."""
    told = f"engine and trainer differ by {found.mean_gap:.3g} nats a token on average, {found.max_gap:.3g} at most"
    if found.stale:
        raise RunFailed(
            f"the engine still holds the weights from before the sync to {version}: {told}, "
            "and it is nearer to the old ones",
            RESUME,
        )
    if not found.mean_gap <= tolerance:
        raise RunFailed(
            f"after the sync to {version} {told}; engine.tolerance is {tolerance:g}: the engine holds something else, "
            "perhaps a mixture",
            RESUME,
        )
