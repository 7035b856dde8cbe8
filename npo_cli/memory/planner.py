"""`npo plan`: does a run fit, and if not, which setting makes it fit? Nothing is loaded and nothing is written.

The figures are sums of the products that are shown; assumed ones say so. None was measured on a GPU.
"""

import operator
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from npo_cli.autonpo.preflight import validate_autonpo_settings
from npo_cli.autonpo.rungs import find_largest_window
from npo_cli.config.loading import apply_overrides, load_recipe
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.memory.footprint import CONTEXT_BYTES, count_engine_gpus, count_trainer_gpus, estimate_footprint
from npo_cli.memory.model_shape import model_shape
from npo_cli.session.distributed import check_distributed_recipe
from npo_cli.types.memory import Allocation, Hardware, Location, MemoryPhase, PeakUsage, ResourceNeed, SettingChange

GB = 10**9
LOCATIONS: tuple[Location, ...] = ("gpu", "engine gpu", "host", "disk")
PHASES: tuple[MemoryPhase, ...] = ("update", "sampling", "saving")
SETTING_CHANGES: dict[Location, tuple[str, ...]] = {
    "gpu": (
        *("train.micro_batch_tokens=/2", "train.micro_batch_tokens=/4", "train.logit_chunk_tokens=/4"),
        *("model.gradient_checkpointing=true", "model.compute_dtype=bfloat16", "train.optimizer=adafactor"),
        *("model.dtype=bfloat16", "model.lora.rank=16", "engine.max_num_seqs=/4", "engine.vllm.enable_sleep_mode=true"),
    ),
    "engine gpu": (
        *("engine.vllm.tensor_parallel_size=*2", "engine.vllm.tensor_parallel_size=*4"),
        "model.compute_dtype=bfloat16",
    ),
    "host": ("train.save_in_background=false", "engine.vllm.enable_sleep_mode=false", "model.lora.rank=16"),
    "disk": (
        *("train.keep_full_checkpoints=2", "train.keep_full_checkpoints=2 train.keep_weights_only=10"),
        *("train.save_every=*2", "model.lora.rank=16", "train.optimizer=adafactor"),
    ),
}
"""Changes that are tried per location; `/2` and `*2` scale the recipe's own value."""


def plan_resources(
    name: str, overrides: Sequence[str], *, method: str | None, hardware: Hardware, autonpo: bool
) -> Iterator[Allocation | PeakUsage | SettingChange]:
    """Every allocation, the peak per location, and for a location that is too small what each setting would change."""

    def load(*changes: str) -> Recipe:
        recipe = load_recipe(name, [*overrides, *changes], method=method)
        validate_gpu_counts(recipe, hardware)
        if autonpo:
            validate_autonpo_settings(recipe, recipe.task.pool_size)
        return recipe

    def find_peaks(recipe: Recipe) -> tuple[list[Allocation], list[PeakUsage]]:
        largest = find_largest_window(recipe) if autonpo else recipe
        allocations = estimate_footprint(largest, model_shape(recipe.model), hardware, autonpo=autonpo)
        return allocations, list(compare_to_limits(allocations, hardware))

    recipe = load()
    allocations, peaks = find_peaks(recipe)
    yield from allocations
    yield from peaks
    for peak in (each for each in peaks if not each.fits):
        yield from find_changes(recipe, peak, load=load, find_peaks=lambda changed: find_peaks(changed)[1])


def find_changes(
    recipe: Recipe,
    peak: PeakUsage,
    *,
    load: Callable[..., Recipe],
    find_peaks: Callable[[Recipe], Sequence[PeakUsage]],
) -> Iterator[SettingChange]:
    """What each setting alone would change of a peak. `load` gives the recipe with KEY=VALUE settings on top."""
    for change in SETTING_CHANGES[peak.location]:
        setting = " ".join(resolve_change(part, recipe) for part in change.split())
        try:
            changed = load(*setting.split())
        except NpoError:
            continue  # not available with the other settings
        after = next(each for each in find_peaks(changed) if each.location == peak.location)
        if after.num_bytes < peak.num_bytes:
            fits = replace(peak, num_bytes=after.num_bytes).fits
            yield SettingChange(setting=setting, location=peak.location, num_bytes=after.num_bytes, fits=fits)


def estimate_needs(recipe: Recipe, folder: Path, *, usable_memory: int) -> list[ResourceNeed]:
    """The peaks of a recipe on this machine, against its GPUs or its `usable_memory`, and the disk of `folder`.

    On a CPU the trainer's memory is the machine's; what is assumed for CUDA and for a process of its own is left out.
    """
    uses_gpu = recipe.model.device != "cpu" and torch.cuda.is_available()
    hardware = Hardware(
        num_gpus=max(1, torch.cuda.device_count()) if uses_gpu else 1 + count_engine_gpus(recipe),
        gpu_bytes=torch.cuda.get_device_properties(0).total_memory if uses_gpu else usable_memory + CONTEXT_BYTES,
        host_bytes=usable_memory if uses_gpu else None,
        disk_bytes=shutil.disk_usage(folder).free,
    )

    def find_peaks(recipe: Recipe) -> list[PeakUsage]:
        return list(compare_to_limits(estimate_footprint(recipe, model_shape(recipe.model), hardware), hardware))

    names: dict[Location, str] = {"gpu": "each GPU", "engine gpu": "each GPU of the engine", "host": "host memory"}
    needs = []
    for peak in find_peaks(recipe):
        if not uses_gpu and peak.location in ("engine gpu", "host"):
            continue
        less = CONTEXT_BYTES if peak.location == "gpu" and not uses_gpu else 0
        hint = ""
        if not peak.fits:
            changes = find_changes(
                recipe, peak, load=lambda *settings: apply_overrides(recipe, settings), find_peaks=find_peaks
            )
            enough = next((change.setting for change in changes if change.fits), None)
            hint = f"add {enough}" if enough else "no single setting is enough: npo plan shows what takes it"
        needs.append(
            ResourceNeed(
                name="memory" if less else names.get(peak.location, "disk"),
                location=peak.location,
                num_bytes=peak.num_bytes - less,
                limit_bytes=None if peak.limit_bytes is None else peak.limit_bytes - less,
                hint=hint,
            )
        )
    return needs


def validate_fits(records: Sequence[Allocation | PeakUsage | SettingChange], hardware: Hardware) -> None:
    """Raise for the first location that is too small, with the first setting that makes the run fit."""
    peak = next((each for each in records if isinstance(each, PeakUsage) and not each.fits), None)
    if peak is None or peak.limit_bytes is None:
        return
    changes = [each for each in records if isinstance(each, SettingChange) and each.location == peak.location]
    enough = next((each.setting for each in changes if each.fits), None)
    more = f"use more of them: --gpus {2 * hardware.num_gpus}" if peak.location == "gpu" else "provide more space"
    raise NpoError(
        f"{peak.location}: {peak.num_bytes / GB:.2f} GB are needed, there are {peak.limit_bytes / GB:.2f} GB",
        f"add {enough}" if enough else f"no single setting is enough: combine several, or {more}",
    )


def validate_gpu_counts(recipe: Recipe, hardware: Hardware) -> None:
    """Refuse a server that leaves no GPU for training, and settings that several processes do not support."""
    trainers, servers = count_trainer_gpus(recipe, hardware), count_engine_gpus(recipe)
    if trainers < 1:
        raise NpoError(
            f"engine.vllm.tensor_parallel_size x engine.vllm.data_parallel_size is {servers} of {hardware.num_gpus} "
            "GPUs: none is left for training",
            f"--gpus {servers + 1}, or engine.kind=vllm",
        )
    if trainers > 1:
        check_distributed_recipe(recipe, trainers)


def compare_to_limits(allocations: Sequence[Allocation], hardware: Hardware) -> Iterator[PeakUsage]:
    """Per location, the sum of what is always held and of the largest phase."""
    limits = {
        "gpu": hardware.gpu_bytes,
        "engine gpu": hardware.gpu_bytes,
        "host": hardware.host_bytes,
        "disk": hardware.disk_bytes,
    }
    for location in LOCATIONS:
        here = [each for each in allocations if each.location == location]
        if here:
            phase = max(PHASES, key=lambda phase: sum_bytes(here, phase))
            phase_bytes, limit = sum_bytes(here, phase), limits[location]
            total = sum_bytes(here, "always") + phase_bytes
            peak_phase = phase if phase_bytes else "always"
            yield PeakUsage(location=location, peak_phase=peak_phase, num_bytes=total, limit_bytes=limit)


def sum_bytes(allocations: Iterable[Allocation], phase: MemoryPhase) -> int:
    """Bytes of one phase."""
    return sum(each.num_bytes for each in allocations if each.phase == phase)


def resolve_change(change: str, recipe: Recipe) -> str:
    """`train.save_every=*2` becomes `train.save_every=40`."""
    key, _, value = change.partition("=")
    if value[0] not in "/*":
        return change
    current, factor = operator.attrgetter(key)(recipe), int(value[1:])
    return f"{key}={max(1, current // factor) if value[0] == '/' else current * factor}"
