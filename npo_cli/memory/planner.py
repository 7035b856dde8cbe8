"""`npo plan`: will it fit, and if not, which setting would make it fit? Nothing is loaded and nothing is written.

The figures are sums of products that are shown. What is a guess says so; no GPU was at hand to measure one.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from npo_cli.autonpo.preflight import validate_autonpo_settings
from npo_cli.config.loading import load_recipe
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.memory.disk import estimate_disk_usage
from npo_cli.memory.footprint import (
    FLOAT_BYTES,
    dtype_bytes,
    engine_gpus,
    engine_needs,
    gpu_needs,
    host_needs,
    trainer_gpus,
)
from npo_cli.memory.model_shape import model_shape
from npo_cli.session.worker_tasks import check_distributed_recipe
from npo_cli.types.memory import Allocation, Hardware, Location, MemoryPhase, ModelShape, PeakUsage, SettingChange

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
        "engine.vllm.tensor_parallel_size=*2",
        "engine.vllm.tensor_parallel_size=*4",
        "model.compute_dtype=bfloat16",
    ),
    "host": ("engine.vllm.enable_sleep_mode=false", "model.lora.rank=16"),
    "disk": (
        *(
            "train.keep_full_checkpoints=2",
            "train.keep_full_checkpoints=2 train.keep_weights_only=10",
            "train.save_every=*2",
        ),
        *("model.lora.rank=16", "train.optimizer=adafactor"),
    ),
}
"""What is tried, place by place; `/2` and `*2` are of the recipe's own figure."""


def plan_resources(
    name: str, overrides: Sequence[str], *, method: str | None, hardware: Hardware, autonpo: bool
) -> Iterator[Allocation | PeakUsage | SettingChange]:
    """Every need, a verdict a place, and for a place that is too small what each knob would make of it."""
    recipe = load_recipe(name, overrides, method=method)
    validate_gpu_counts(recipe, hardware)
    if autonpo:
        validate_autonpo_settings(recipe, recipe.task.pool_size)
    needs = list(estimate_needs(recipe, hardware, autonpo=autonpo))
    yield from needs
    verdicts = list(compare_to_limits(needs, hardware))
    yield from verdicts
    for verdict in verdicts:
        if not verdict.fits:
            yield from try_changes(name, overrides, verdict, method=method, hardware=hardware, autonpo=autonpo)


def validate_fits(found: Sequence[Allocation | PeakUsage | SettingChange], footing: Hardware) -> None:
    """The first place that is too small, and the first setting that is enough."""
    short = next((one for one in found if isinstance(one, PeakUsage) and not one.fits), None)
    if short is None or short.limit_bytes is None:
        return
    enough = [
        one.setting for one in found if isinstance(one, SettingChange) and one.fits and one.location == short.location
    ]
    more = f", or more of them: --gpus {2 * footing.num_gpus}" if short.location == "gpu" else ", or bring more room"
    raise NpoError(
        f"{short.location}: {short.num_bytes / GB:.2f} GB are needed, there are {short.limit_bytes / GB:.2f} GB",
        f"add {enough[0]}" if enough else f"no single setting is enough: combine those of the table{more}",
    )


def validate_gpu_counts(recipe: Recipe, footing: Hardware) -> None:
    """GPUs for a server and none left to train on, or what several processes cannot do."""
    left = trainer_gpus(recipe, footing)
    if left < 1:
        raise NpoError(
            f"engine.vllm.tensor_parallel_size x engine.vllm.data_parallel_size is {engine_gpus(recipe)}, and there "
            f"are {footing.num_gpus} "
            "GPUs: none is left for training",
            f"--gpus {engine_gpus(recipe) + 1}, or engine.kind=vllm",
        )
    if left > 1:
        check_distributed_recipe(recipe, left)


def estimate_needs(recipe: Recipe, footing: Hardware, *, autonpo: bool) -> Iterator[Allocation]:
    """Of every place."""
    shape = model_shape(recipe.model)
    yield from gpu_needs(recipe, shape, footing)
    yield from engine_needs(recipe, shape, footing)
    yield from host_needs(recipe, shape, footing)
    weights, moments = checkpoint_bytes(recipe, shape)
    served = shape.num_params * dtype_bytes(recipe.model.dtype)
    yield from estimate_disk_usage(recipe, weights=weights, optimizer_state=moments, full_model=served, autonpo=autonpo)


def checkpoint_bytes(recipe: Recipe, shape: ModelShape) -> tuple[int, int]:
    """What one checkpoint writes: weights or adapters, and the optimiser's state."""
    wide = FLOAT_BYTES if shape.num_lora_params else dtype_bytes(recipe.model.dtype)
    trained = shape.num_lora_params or shape.num_params
    kept = 2 * trained if recipe.train.optimizer == "adamw" else shape.adafactor_floats
    return trained * wide, kept * wide


def compare_to_limits(needs: Sequence[Allocation], footing: Hardware) -> Iterator[PeakUsage]:
    """Of each place what is always held, and the phase that comes on top."""
    limits = {
        "gpu": footing.gpu_bytes,
        "engine gpu": footing.gpu_bytes,
        "host": footing.host_bytes,
        "disk": footing.disk_bytes,
    }
    for where in LOCATIONS:
        here = [need for need in needs if need.location == where]
        if here:
            peak = max(PHASES, key=lambda phase: sum_bytes(here, phase))
            peak = peak if sum_bytes(here, peak) else "always"
            num_bytes = sum_bytes(here, "always") + (sum_bytes(here, peak) if peak != "always" else 0)
            yield PeakUsage(location=where, peak_phase=peak, num_bytes=num_bytes, limit_bytes=limits[where])


def sum_bytes(needs: Iterable[Allocation], phase: MemoryPhase) -> int:
    """Bytes of one phase."""
    return sum(need.num_bytes for need in needs if need.phase == phase)


def try_changes(
    name: str, overrides: Sequence[str], short: PeakUsage, *, method: str | None, hardware: Hardware, autonpo: bool
) -> Iterator[SettingChange]:
    """Each knob alone, by the same estimate; those that change nothing, or that the recipe refuses, are left out."""
    before = load_recipe(name, overrides, method=method)
    for knob in SETTING_CHANGES[short.location]:
        setting = " ".join(resolve_change(one, before) for one in knob.split())
        try:
            recipe = load_recipe(name, [*overrides, *setting.split()], method=method)
            validate_gpu_counts(recipe, hardware)
            if autonpo:
                validate_autonpo_settings(recipe, recipe.task.pool_size)
        except NpoError:
            continue
        needs = estimate_needs(recipe, hardware, autonpo=autonpo)
        found = next(one for one in compare_to_limits(list(needs), hardware) if one.location == short.location)
        if found.num_bytes < short.num_bytes:
            fits = replace(short, num_bytes=found.num_bytes).fits
            yield SettingChange(setting=setting, location=short.location, num_bytes=found.num_bytes, fits=fits)


def resolve_change(knob: str, recipe: Recipe) -> str:
    """`train.save_every=*2` becomes `train.save_every=40`."""
    key, _, value = knob.partition("=")
    if value[0] not in "/*":
        return knob
    own, factor = operator.attrgetter(key)(recipe), int(value[1:])
    return f"{key}={max(1, own // factor) if value[0] == '/' else own * factor}"
