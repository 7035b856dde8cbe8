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
"""Mean |engine - trainer| in nats a token, for the same weights. In float32 single tokens differed by at most 4e-5; the
figure for bfloat16 is a guess."""
MIN_STANDARD_ERRORS = 4.0
"""Standard errors on either side between the old weights and the new before a probe may say which the engine holds."""
MIN_STALE_FRACTION = 0.1
"""Of the way back to the old weights; below it an engine is off, not stale, and the tolerance judges it."""
RESUME_HINT = "nothing was lost: `npo resume RUN` goes on from the last checkpoint"

TokenLogps = tuple[float, ...]


def named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor under its Hugging Face name, the head under its own even where it is tied to the embedding."""
    return add_head(model, model.state_dict())


def add_head(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, and the head under its own name even where it is tied to the embedding."""
    found = {name: tensor.detach() for name, tensor in tensors.items()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            found.setdefault(f"{name}.weight", head.weight.detach())
    return found


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and copied there only where it must be: a file has no two names for one storage."""
    found: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        here = tensor.cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        found[name] = here.clone() if place in taken else here
        taken.add(place)
    return found


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_sent_tensors(
    expected: Mapping[str, tuple[int, ...]],
    offered: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """The tensors that the engine was started with, no fewer, no others, in the same shapes, all of them finite.

    `shapes`: those of the offered tensors, where not all of them counts.
    """
    shapes = tensor_shapes(offered) if shapes is None else shapes
    findings = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown to the engine": sorted(shapes.keys() - expected.keys()),
        "of another shape": sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]),
        "not finite": sorted(name for name, tensor in offered.items() if not torch.isfinite(tensor).all()),
    }
    for what, names in findings.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise RunFailed(f"weights were not sent to the engine: tensor {what}: {shown}", RESUME_HINT)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncCheck:
    """One probe scored by both sides, with the trainer's scores of the weights before as a third opinion."""

    engine_logps: Sequence[TokenLogps]
    trainer_logps: Sequence[TokenLogps]
    previous_logps: Sequence[TokenLogps] | None
    """The trainer's scores of the weights that the engine held until now; None for the first sync."""

    @property
    def mean_gap(self) -> float:
        """Mean |engine - trainer| over all tokens, nats; a value that is no number counts as infinite."""
        gaps = [abs(a - b) for a, b in self._pairs(self.trainer_logps)]
        return math.inf if any(map(math.isnan, gaps)) else sum(gaps) / len(gaps)

    @property
    def max_gap(self) -> float:
        """Largest |engine - trainer|."""
        return max(abs(a - b) for a, b in self._pairs(self.trainer_logps))

    @property
    def stale_fraction(self) -> float:
        """How far the engine stands on the way from the new weights (0) back to the old ones (1).

        The projection c = <e - new, old - new>/d with d = |old - new|^2: a stale engine has 1, a mixture some part.
        """
        away, back, squared = self._displacements()
        return sum(a * b for a, b in zip(away, back, strict=True)) / squared if squared > 0 else 0.0

    @property
    def stale_fraction_error(self) -> float:
        """Standard error of that share: s/sqrt(d), with s the engine's noise a token across the way."""
        away, back, squared = self._displacements()
        if squared == 0:
            return math.inf
        share = self.stale_fraction
        rest = sum((a - share * b) ** 2 for a, b in zip(away, back, strict=True))
        return math.sqrt(rest / len(away) / squared)

    @property
    def is_decisive(self) -> bool:
        """Whether old and new are far enough apart to tell which of them the engine holds: 2 SURE errors."""
        return self.previous_logps is not None and self.stale_fraction_error * 2 * MIN_STANDARD_ERRORS <= 1

    @property
    def is_stale(self) -> bool:
        """Whether the engine holds some of the old weights, beyond what noise explains."""
        return self.is_decisive and self.stale_fraction > max(
            MIN_STALE_FRACTION, MIN_STANDARD_ERRORS * self.stale_fraction_error
        )

    def _displacements(self) -> tuple[list[float], list[float], float]:
        """e - new and old - new, a token each, and |old - new|^2."""
        if self.previous_logps is None:
            return [], [], 0.0
        away = [a - b for a, b in self._pairs(self.trainer_logps)]
        rows = zip(self.previous_logps, self.trainer_logps, strict=True)
        back = [a - b for row, now in rows for a, b in zip(row, now, strict=True)]
        return away, back, sum(each * each for each in back)

    def _pairs(self, other: Sequence[TokenLogps]) -> list[tuple[float, float]]:
        rows = zip(self.engine_logps, other, strict=True)
        return [pair for mine, theirs in rows for pair in zip(mine, theirs, strict=True)]


def check_agreement(found: SyncCheck, *, tolerance: float, version: str) -> None:
    """Stop where the engine does not score the probe as the weights it was given do."""
    told = f"engine and trainer differ by {found.mean_gap:.3g} nats a token on average, {found.max_gap:.3g} at most"
    if found.is_stale:
        raise RunFailed(
            f"the engine still holds weights from before the sync to {version}: {told}, "
            f"and it stands at {found.stale_fraction:.0%} of the way back to the old ones",
            RESUME_HINT,
        )
    if not found.mean_gap <= tolerance:
        raise RunFailed(
            f"after the sync to {version} {told}; engine.sync_tolerance is {tolerance:g}: the engine holds something "
            "else, "
            "perhaps a mixture",
            RESUME_HINT,
        )
