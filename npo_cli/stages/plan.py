"""`npo plan`: will it fit, and if not, which setting would make it fit? Nothing is loaded and nothing is written.

The figures are sums of products that are shown. What is a guess says so; no GPU was at hand to measure one.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from npo_cli.config import Recipe
from npo_cli.errors import NpoError
from npo_cli.loading import load_recipe
from npo_cli.plan_records import Footing, Knob, ModelShape, Need, Phase, Verdict, Where
from npo_cli.policy.footprint import FLOAT, bytes_of, engine_gpus, engine_needs, gpu_needs, host_needs, trainer_gpus
from npo_cli.policy.shape import model_shape
from npo_cli.run_dir.room import disk_needs
from npo_cli.stages.auto_checks import refuse_impossible
from npo_cli.stages.together import refuse_many

GB = 10**9
PLACES: tuple[Where, ...] = ("gpu", "engine gpu", "host", "disk")
PHASES: tuple[Phase, ...] = ("update", "sampling", "saving")
KNOBS: dict[Where, tuple[str, ...]] = {
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


def plan_recipe(
    name: str, overrides: Sequence[str], *, method: str | None, footing: Footing, autonpo: bool
) -> Iterator[Need | Verdict | Knob]:
    """Every need, a verdict a place, and for a place that is too small what each knob would make of it."""
    recipe = load_recipe(name, overrides, method=method)
    refuse_footing(recipe, footing)
    if autonpo:
        refuse_impossible(recipe, recipe.task.pool_size)
    needs = list(all_needs(recipe, footing, autonpo=autonpo))
    yield from needs
    verdicts = list(judged(needs, footing))
    yield from verdicts
    for verdict in verdicts:
        if not verdict.fits:
            yield from tried(name, overrides, verdict, method=method, footing=footing, autonpo=autonpo)


def refuse_short(found: Sequence[Need | Verdict | Knob], footing: Footing) -> None:
    """The first place that is too small, and the first setting that is enough."""
    short = next((one for one in found if isinstance(one, Verdict) and not one.fits), None)
    if short is None or short.limit is None:
        return
    enough = [one.setting for one in found if isinstance(one, Knob) and one.fits and one.where == short.where]
    more = f", or more of them: --gpus {2 * footing.num_gpus}" if short.where == "gpu" else ", or bring more room"
    raise NpoError(
        f"{short.where}: {short.num_bytes / GB:.2f} GB are needed, there are {short.limit / GB:.2f} GB",
        f"add {enough[0]}" if enough else f"no single setting is enough: combine those of the table{more}",
    )


def refuse_footing(recipe: Recipe, footing: Footing) -> None:
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
        refuse_many(recipe, left)


def all_needs(recipe: Recipe, footing: Footing, *, autonpo: bool) -> Iterator[Need]:
    """Of every place."""
    shape = model_shape(recipe.model)
    yield from gpu_needs(recipe, shape, footing)
    yield from engine_needs(recipe, shape, footing)
    yield from host_needs(recipe, shape, footing)
    weights, moments = checkpoint_bytes(recipe, shape)
    served = shape.num_params * bytes_of(recipe.model.dtype)
    yield from disk_needs(recipe, weights=weights, moments=moments, served=served, autonpo=autonpo)


def checkpoint_bytes(recipe: Recipe, shape: ModelShape) -> tuple[int, int]:
    """What one checkpoint writes: weights or adapters, and the optimiser's state."""
    wide = FLOAT if shape.num_adapters else bytes_of(recipe.model.dtype)
    trained = shape.num_adapters or shape.num_params
    kept = 2 * trained if recipe.train.optimizer == "adamw" else shape.adafactor_floats
    return trained * wide, kept * wide


def judged(needs: Sequence[Need], footing: Footing) -> Iterator[Verdict]:
    """Of each place what is always held, and the phase that comes on top."""
    limits = {
        "gpu": footing.gpu_bytes,
        "engine gpu": footing.gpu_bytes,
        "host": footing.host_bytes,
        "disk": footing.disk_bytes,
    }
    for where in PLACES:
        here = [need for need in needs if need.where == where]
        if here:
            peak = max(PHASES, key=lambda phase: total(here, phase))
            peak = peak if total(here, peak) else "always"
            num_bytes = total(here, "always") + (total(here, peak) if peak != "always" else 0)
            yield Verdict(where=where, peak=peak, num_bytes=num_bytes, limit=limits[where])


def total(needs: Iterable[Need], phase: Phase) -> int:
    """Bytes of one phase."""
    return sum(need.num_bytes for need in needs if need.phase == phase)


def tried(
    name: str, overrides: Sequence[str], short: Verdict, *, method: str | None, footing: Footing, autonpo: bool
) -> Iterator[Knob]:
    """Each knob alone, by the same estimate; those that change nothing, or that the recipe refuses, are left out."""
    before = load_recipe(name, overrides, method=method)
    for knob in KNOBS[short.where]:
        setting = " ".join(worded(one, before) for one in knob.split())
        try:
            recipe = load_recipe(name, [*overrides, *setting.split()], method=method)
            refuse_footing(recipe, footing)
            if autonpo:
                refuse_impossible(recipe, recipe.task.pool_size)
        except NpoError:
            continue
        needs = all_needs(recipe, footing, autonpo=autonpo)
        found = next(one for one in judged(list(needs), footing) if one.where == short.where)
        if found.num_bytes < short.num_bytes:
            fits = replace(short, num_bytes=found.num_bytes).fits
            yield Knob(setting=setting, where=short.where, num_bytes=found.num_bytes, fits=fits)


def worded(knob: str, recipe: Recipe) -> str:
    """`train.save_every=*2` becomes `train.save_every=40`."""
    key, _, value = knob.partition("=")
    if value[0] not in "/*":
        return knob
    own, factor = operator.attrgetter(key)(recipe), int(value[1:])
    return f"{key}={max(1, own // factor) if value[0] == '/' else own * factor}"
