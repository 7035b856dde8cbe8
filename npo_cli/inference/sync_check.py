"""Verification of weight syncs: tensor names and shapes before, log-probabilities of fixed check rows after.

vLLM 0.32 fails silently in two ways: a tied LM head keeps its old weights, and a tensor that was never sent only causes
a warning. So names and shapes are compared before a sync, and after it engine and trainer score the same rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.errors import RunFailed

TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Allowed mean |engine - trainer| (nats per token) for equal weights. In float32 the largest difference measured on one
token was 4e-5; the value for bfloat16 is a guess."""
MIN_STANDARD_ERRORS = 4.0
"""The check distinguishes old from new weights if they are at least twice this many standard errors apart."""
MIN_STALE_FRACTION = 0.1
"""Below this stale fraction an engine counts as inaccurate, not stale, and only the tolerance applies."""
RESUME_HINT = "nothing is lost: npo resume RUN continues from the last checkpoint"

TokenLogps = tuple[float, ...]


def named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor under its Hugging Face name, the LM head included even if it is tied to the embedding."""
    return add_head(model, model.state_dict())


def add_head(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, and the LM head under its own name even if it is tied to the embedding."""
    named = {name: tensor.detach() for name, tensor in tensors.items()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            named.setdefault(f"{name}.weight", head.weight.detach())
    return named


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share a storage, as safetensors requires."""
    copies: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        on_cpu = tensor.cpu().contiguous()
        storage = on_cpu.untyped_storage().data_ptr()
        copies[name] = on_cpu.clone() if storage in storages else on_cpu
        storages.add(storage)
    return copies


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_sent_tensors(
    expected: Mapping[str, tuple[int, ...]],
    offered: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Check that exactly the tensors that the engine was started with are sent, in the same shapes, all finite.

    `shapes`: the shapes to compare, if they are not simply those of the offered tensors (see `AdapterHandle`).
    """
    shapes = tensor_shapes(offered) if shapes is None else shapes
    findings = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown to the engine": sorted(shapes.keys() - expected.keys()),
        "in another shape": sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]),
        "not finite": sorted(name for name, tensor in offered.items() if not torch.isfinite(tensor).all()),
    }
    for what, names in findings.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise RunFailed(f"the weights do not match the engine's model: tensors {what}: {shown}", RESUME_HINT)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncCheck:
    """Log-probabilities of the check rows under engine, trainer, and the trainer's previous weights."""

    engine_logps: Sequence[TokenLogps]
    trainer_logps: Sequence[TokenLogps]
    previous_logps: Sequence[TokenLogps] | None
    """Under the weights that the engine held before the sync; None for the first sync."""

    @property
    def mean_gap(self) -> float:
        """Mean |engine - trainer| over all tokens (nats); NaN counts as infinite."""
        gaps = [abs(a - b) for a, b in self._pairs(self.trainer_logps)]
        return math.inf if any(map(math.isnan, gaps)) else sum(gaps) / len(gaps)

    @property
    def max_gap(self) -> float:
        """Maximum |engine - trainer| (nats)."""
        return max(abs(a - b) for a, b in self._pairs(self.trainer_logps))

    @property
    def stale_fraction(self) -> float:
        """Position of the engine between the new weights (0) and the old ones (1).

        The projection <e - new, old - new> / |old - new|^2: a stale engine has 1, a mixture a fraction.
        """
        engine_offset, old_offset, squared = self._displacements()
        return sum(a * b for a, b in zip(engine_offset, old_offset, strict=True)) / squared if squared > 0 else 0.0

    @property
    def stale_fraction_error(self) -> float:
        """Standard error of `stale_fraction`: s / |old - new|, with s the RMS of the residual per token."""
        engine_offset, old_offset, squared = self._displacements()
        if squared == 0:
            return math.inf
        fraction = self.stale_fraction
        residual = sum((a - fraction * b) ** 2 for a, b in zip(engine_offset, old_offset, strict=True))
        return math.sqrt(residual / len(engine_offset) / squared)

    @property
    def is_decisive(self) -> bool:
        """Whether old and new weights differ enough to distinguish them: by 2 MIN_STANDARD_ERRORS standard errors."""
        return self.previous_logps is not None and self.stale_fraction_error * 2 * MIN_STANDARD_ERRORS <= 1

    @property
    def is_stale(self) -> bool:
        """Whether the engine holds old weights, wholly or in part, beyond what noise explains."""
        return self.is_decisive and self.stale_fraction > max(
            MIN_STALE_FRACTION, MIN_STANDARD_ERRORS * self.stale_fraction_error
        )

    def _displacements(self) -> tuple[list[float], list[float], float]:
        """Per token e - new and old - new, and |old - new|^2."""
        if self.previous_logps is None:
            return [], [], 0.0
        engine_offset = [a - b for a, b in self._pairs(self.trainer_logps)]
        rows = zip(self.previous_logps, self.trainer_logps, strict=True)
        old_offset = [a - b for old, new in rows for a, b in zip(old, new, strict=True)]
        return engine_offset, old_offset, sum(each * each for each in old_offset)

    def _pairs(self, other: Sequence[TokenLogps]) -> list[tuple[float, float]]:
        rows = zip(self.engine_logps, other, strict=True)
        return [pair for engine, theirs in rows for pair in zip(engine, theirs, strict=True)]


def check_agreement(check: SyncCheck, *, tolerance: float, version: str) -> None:
    """Raise if the engine's log-probabilities do not match the weights that were sent."""
    gap = f"mean |engine - trainer| is {check.mean_gap:.3g} nats per token (maximum {check.max_gap:.3g})"
    if check.is_stale:
        raise RunFailed(
            f"weight sync to {version} failed: the engine's log-probabilities match the previous weights "
            f"({check.stale_fraction:.0%}); {gap}",
            RESUME_HINT,
        )
    if not check.mean_gap <= tolerance:
        raise RunFailed(
            f"weight sync to {version} failed: {gap}, engine.sync_tolerance is {tolerance:g}; the engine may hold "
            "other weights",
            RESUME_HINT,
        )
