"""Where the memory of training goes, as plain arithmetic on a model's shape and a recipe.

What is held all the time, and on top of it the larger of two: an update, or sampling. Under FSDP2 each of N GPUs holds
1/N of weights, gradients and moments, and gathers one block at a time; to sample it gathers the whole model.
"""

from collections.abc import Iterator
from math import ceil

from npo_cli.config.recipe import Recipe
from npo_cli.inference.base import Engine
from npo_cli.registry import ENGINES
from npo_cli.types.memory import Allocation, Hardware, MemoryPhase, ModelShape

FLOAT_BYTES, HALF_BYTES = 4, 2
CHUNK_COPIES = 4
"""float32 rows of the vocabulary alive in the backward pass of a chunk: two saved, two on the way."""
SAMPLER_COPIES = 6
"""The same of one sampled token: logits, log-probabilities, probabilities, and their sums in float64."""
VLLM = "vLLM"
CONTEXT_BYTES = 1_500_000_000
"""CUDA, its libraries and NCCL in each process: a guess, as no GPU was at hand."""
UNCOUNTED_FRACTION = 0.1
"""Of what is counted, put beside it: on a CPU the measured peaks of an update lay 6 to 16 % above the sum."""
PROCESS_BYTES = 4_000_000_000
"""Python, torch and its libraries in the memory of the machine: a guess."""


def dtype_bytes(dtype: str) -> int:
    """Of one number."""
    return HALF_BYTES if dtype == "bfloat16" else FLOAT_BYTES


def trainer_gpus(recipe: Recipe, footing: Hardware) -> int:
    """GPUs left for training beside those of a server."""
    return footing.num_gpus - engine_gpus(recipe)


def engine_gpus(recipe: Recipe) -> int:
    """GPUs of a vLLM server of its own; 0 where the trainer's GPUs sample."""
    engine = recipe.engine
    in_trainer = ENGINES.get(engine.kind).runs_in_trainer
    return 0 if in_trainer else engine.vllm.tensor_parallel_size * engine.vllm.data_parallel_size


def max_row_tokens(recipe: Recipe) -> int:
    """Prompt and response together, in tokens."""
    return recipe.task.max_prompt_tokens + recipe.sampling.max_new_tokens


def gpu_needs(recipe: Recipe, shape: ModelShape, footing: Hardware) -> Iterator[Allocation]:
    """Of each GPU that trains."""
    counted = [
        *_held(recipe, shape, num_gpus=trainer_gpus(recipe, footing)),
        *_update(recipe, shape, num_gpus=trainer_gpus(recipe, footing)),
        *_sampling(recipe, shape, footing),
        *_pushing(recipe, shape),
    ]
    yield from counted
    yield Allocation(location="gpu", phase="always", label="CUDA and NCCL", num_bytes=CONTEXT_BYTES, formula="a guess")
    for phase in ("always", "update", "sampling"):
        rest = sum(need.num_bytes for need in counted if need.phase == phase and need.label != VLLM)
        if rest:
            size = ceil(UNCOUNTED_FRACTION * rest)
            yield Allocation(
                location="gpu", phase=phase, label="what is not counted", num_bytes=size, formula="a tenth of the rest"
            )


def _held(recipe: Recipe, shape: ModelShape, *, num_gpus: int) -> Iterator[Allocation]:
    model, train = recipe.model, recipe.train
    weight = dtype_bytes(model.dtype)
    trained = shape.num_lora_params or shape.num_params
    # Adapters are float32 whatever the base is.
    wide = FLOAT_BYTES if shape.num_lora_params else weight
    share = f" / {num_gpus} GPUs" if num_gpus > 1 else ""

    def need(what: str, count: float, each: int, *, how: str, phase: MemoryPhase = "always") -> Allocation:
        return Allocation(
            location="gpu", phase=phase, label=what, num_bytes=ceil(count * each / num_gpus), formula=how + share
        )

    yield need("weights", shape.num_params, weight, how=f"{_count(shape.num_params)} x {weight} B")
    if shape.num_lora_params:
        yield need(
            "adapters", shape.num_lora_params, FLOAT_BYTES, how=f"{_count(shape.num_lora_params)} x {FLOAT_BYTES} B"
        )
    # Given back when the update is made, so they are not there to sample.
    yield need("gradients", trained, wide, how=f"{_count(trained)} x {wide} B", phase="update")
    if train.optimizer == "adamw":
        yield need("AdamW's moments", 2 * trained, wide, how=f"2 x {_count(trained)} x {wide} B")
    else:
        floats = shape.adafactor_floats
        yield need("Adafactor's rows and columns", floats, wide, how=f"{_count(floats)} x {wide} B")
    if recipe.loss.kl_coef > 0 and not shape.num_lora_params:
        how = f"{_count(shape.num_params)} x {weight} B"
        yield need("frozen base of the KL term", shape.num_params, weight, how=how)


def _update(recipe: Recipe, shape: ModelShape, *, num_gpus: int) -> Iterator[Allocation]:
    model, train = recipe.model, recipe.train
    compute, weight = dtype_bytes(model.precision), dtype_bytes(model.dtype)
    tokens = max(train.micro_batch_tokens, max_row_tokens(recipe))
    chunk = min(train.logit_chunk_tokens, tokens)

    def need(what: str, num_bytes: float, how: str) -> Allocation:
        return Allocation(location="gpu", phase="update", label=what, num_bytes=ceil(num_bytes), formula=how)

    if model.gradient_checkpointing:
        a_token = shape.checkpointed_activation_bytes + shape.layer_activation_bytes
        how = f"{tokens:,} tokens x ({_kb(shape.checkpointed_activation_bytes)} + a layer's {_kb(shape.layer_activation_bytes)})"  # noqa: E501
    else:
        a_token, how = shape.activation_bytes, f"{tokens:,} tokens x {_kb(shape.activation_bytes)}"
    yield need("activations", tokens * a_token, how)
    if shape.vision_activation_bytes and recipe.task.max_prompt_tokens:
        images = tokens * recipe.task.max_prompt_tokens / max_row_tokens(recipe)
        one = shape.vision_activation_bytes
        yield need("vision tower", images * one, f"at most {images:,.0f} image tokens x {_kb(one)}")
    rows = chunk * shape.vocab_size * (CHUNK_COPIES * FLOAT_BYTES + compute)
    yield need(
        "logits of a chunk", rows, f"{chunk:,} tokens x {shape.vocab_size:,} x {CHUNK_COPIES * FLOAT_BYTES + compute} B"
    )
    if num_gpus > 1:
        gathered = shape.root_params + 2 * shape.largest_block_params
        yield need("gathered blocks", gathered * (compute + weight), "embedding, head and two blocks, and gradients")
    elif compute < weight:
        yield need("weights in bfloat16", shape.num_params * compute, f"{_count(shape.num_params)} x {compute} B")
    trained = shape.num_lora_params or shape.num_params
    wide = FLOAT_BYTES if shape.num_lora_params else weight
    yield need("a guide's part of the gradient", trained * wide / num_gpus, "a copy while a group is mixed")


def _sampling(recipe: Recipe, shape: ModelShape, footing: Hardware) -> Iterator[Allocation]:
    """By the trainer's own model, or by vLLM on the same GPU; a server has GPUs of its own."""
    num_gpus = trainer_gpus(recipe, footing)
    compute = dtype_bytes(recipe.model.precision)
    engine: type[Engine] = ENGINES.get(recipe.engine.kind)
    if engine.runs_in_trainer and engine.needs_weight_sync:
        share = int(recipe.engine.vllm.gpu_memory_utilization * footing.gpu_bytes)
        phase = "sampling" if recipe.engine.vllm.enable_sleep_mode else "always"
        how = f"engine.vllm.gpu_memory_utilization={recipe.engine.vllm.gpu_memory_utilization:g} of the GPU"
        yield Allocation(location="gpu", phase=phase, label=VLLM, num_bytes=share, formula=how)
        return
    # Scoring, the sync's probe included, gathers them whoever samples.
    if num_gpus > 1 or compute < dtype_bytes(recipe.model.dtype):
        whole = shape.num_params * compute
        how = f"{_count(shape.num_params)} x {compute} B"
        yield Allocation(location="gpu", phase="sampling", label="whole weights", num_bytes=whole, formula=how)
    if not engine.runs_in_trainer:
        return
    rows = min(recipe.engine.max_num_seqs, ceil(recipe.train.prompts_per_step * recipe.train.group_size / num_gpus))
    cache = rows * max_row_tokens(recipe) * shape.kv_cache_floats * compute
    how = f"{rows} rows x {max_row_tokens(recipe):,} tokens x {_kb(shape.kv_cache_floats * compute)}"
    yield Allocation(location="gpu", phase="sampling", label="KV cache", num_bytes=cache, formula=how)
    logits = rows * shape.vocab_size * (SAMPLER_COPIES * FLOAT_BYTES + compute)
    yield Allocation(
        location="gpu",
        phase="sampling",
        label="logits",
        num_bytes=logits,
        formula=f"{rows} rows x {shape.vocab_size:,}",
    )


def _pushing(recipe: Recipe, shape: ModelShape) -> Iterator[Allocation]:
    """The policy pushed along its own motion: an older model beside it, or weights that are moved and put back."""
    if not recipe.uses_motion:
        return
    weight, compute = dtype_bytes(recipe.model.dtype), dtype_bytes(recipe.model.precision)
    # Adapters are float32, and both models share one base.
    trained, wide = (shape.num_lora_params, FLOAT_BYTES) if shape.num_lora_params else (shape.num_params, weight)
    how = f"{_count(trained)} x {wide} B"
    if recipe.extrapolation.space == "weights":
        yield Allocation(location="gpu", phase="sampling", label="moved weights", num_bytes=trained * wide, formula=how)
        return
    yield Allocation(location="gpu", phase="always", label="an older copy", num_bytes=trained * wide, formula=how)
    rows = min(recipe.engine.max_num_seqs, recipe.train.prompts_per_step * recipe.train.group_size)
    size = rows * max_row_tokens(recipe) * shape.kv_cache_floats * compute
    yield Allocation(
        location="gpu", phase="sampling", label="its KV cache", num_bytes=size, formula=f"at most {rows} rows"
    )


def engine_needs(recipe: Recipe, shape: ModelShape, footing: Hardware) -> Iterator[Allocation]:
    """Of each GPU of a vLLM server: its part of the weights, and a cache in which at least one response has room."""
    if not engine_gpus(recipe):
        return
    parallel, compute = recipe.engine.vllm.tensor_parallel_size, dtype_bytes(recipe.model.precision)

    def need(what: str, num_bytes: float, how: str) -> Allocation:
        return Allocation(location="engine gpu", phase="always", label=what, num_bytes=ceil(num_bytes), formula=how)

    yield need(
        "weights", shape.num_params * compute / parallel, f"{_count(shape.num_params)} x {compute} B / {parallel}"
    )
    least = max_row_tokens(recipe) * shape.kv_cache_floats * compute / parallel
    yield need(
        "KV cache of one response", least, f"{max_row_tokens(recipe):,} tokens; what is left serves more of them"
    )
    yield need(
        "what vLLM leaves alone",
        (1 - recipe.engine.vllm.gpu_memory_utilization) * footing.gpu_bytes,
        "1 - engine.vllm.gpu_memory_utilization",
    )


def host_needs(recipe: Recipe, shape: ModelShape, footing: Hardware) -> Iterator[Allocation]:
    """Of the memory of one machine."""
    processes = min(footing.gpus_per_machine, max(1, trainer_gpus(recipe, footing)))
    held, weight = shape.num_params, dtype_bytes(recipe.model.dtype)

    def need(phase: MemoryPhase, what: str, num_bytes: float, *, how: str) -> Allocation:
        return Allocation(location="host", phase=phase, label=what, num_bytes=ceil(num_bytes), formula=how)

    guess = f"{processes} x a guess of {PROCESS_BYTES // 10**9} GB"
    yield need("always", "processes", processes * PROCESS_BYTES, how=guess)
    written = shape.num_lora_params * FLOAT_BYTES if shape.num_lora_params else held * weight
    yield need("saving", "weights on their way to the disk", written, how="gathered by the first process")
    engine: type[Engine] = ENGINES.get(recipe.engine.kind)
    if engine.runs_in_trainer and engine.needs_weight_sync and recipe.engine.vllm.enable_sleep_mode:
        each = held * dtype_bytes(recipe.model.precision) * processes
        yield need("update", "vLLM's weights while it sleeps", each, how=f"{processes} engines")


def _count(num: int) -> str:
    return f"{num / 1e9:.2f} G" if num >= 1e9 else f"{num / 1e6:.2f} M"


def _kb(num_bytes: float) -> str:
    return f"{num_bytes / 1000:,.1f} kB"
