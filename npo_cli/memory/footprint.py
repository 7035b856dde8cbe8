"""Memory and disk space of a run, in closed form from the model's shape and the recipe.

Each GPU holds some allocations always and, on top of them, those of the larger phase: update or sampling. With FSDP2
each of N GPUs holds 1/N of weights, gradients and optimizer state, and gathers one block at a time; for sampling it
gathers the whole model.
"""

from math import ceil

from npo_cli.config.recipe import Recipe
from npo_cli.inference.base import ENGINES, Engine
from npo_cli.inference.token_sampler import CHUNK_NUMBERS
from npo_cli.storage.disk_space import estimate_disk
from npo_cli.types.memory import Allocation, Hardware, Location, MemoryPhase, ModelShape

FLOAT_BYTES, HALF_BYTES = 4, 2
CHUNK_COPIES = 4
"""float32 rows over the vocabulary alive in the backward pass of a logit chunk: two saved, two intermediate."""
SAMPLER_COPIES = 3
"""The same where a token is chosen, a chunk of rows at a time: logits, log-probabilities, probabilities."""
VLLM = "vLLM"
CONTEXT_BYTES = 1_500_000_000
"""CUDA, its libraries and NCCL per process: assumed, not measured."""
UNCOUNTED_FRACTION = 0.1
"""Added to what is counted: on a CPU the measured peaks of an update were 6 to 16 % above the sum."""
PROCESS_BYTES = 4_000_000_000
"""Host memory of Python, torch and its libraries per process: assumed, not measured."""


def dtype_bytes(dtype: str) -> int:
    """Bytes per number."""
    return HALF_BYTES if dtype == "bfloat16" else FLOAT_BYTES


def count_engine_gpus(recipe: Recipe) -> int:
    """GPUs of an engine in its own process; 0 if it uses the trainer's GPUs."""
    vllm = recipe.engine.vllm
    in_trainer = ENGINES.get(recipe.engine.kind).runs_in_trainer
    return 0 if in_trainer else vllm.tensor_parallel_size * vllm.data_parallel_size


def count_trainer_gpus(recipe: Recipe, hardware: Hardware) -> int:
    """GPUs that train."""
    return hardware.num_gpus - count_engine_gpus(recipe)


def estimate_footprint(
    recipe: Recipe, shape: ModelShape, hardware: Hardware, *, autonpo: bool = False
) -> list[Allocation]:
    """Every allocation of a run: per training GPU, per engine GPU, per machine, and on disk."""
    footprint = _Footprint(recipe, shape, hardware)
    footprint.add_gpu_state()
    footprint.add_teacher()
    footprint.add_update()
    footprint.add_sampling()
    footprint.add_producer()
    footprint.add_extrapolation()
    footprint.add_uncounted()
    footprint.add_engine_gpu()
    footprint.add_host()
    footprint.add_disk(autonpo=autonpo)
    return footprint.allocations


class _Footprint:
    """Collects allocations; sizes that several of them need are computed once."""

    def __init__(self, recipe: Recipe, shape: ModelShape, hardware: Hardware) -> None:
        self.allocations: list[Allocation] = []
        self.recipe, self.shape, self.hardware = recipe, shape, hardware
        self.engine: type[Engine] = ENGINES.get(recipe.engine.kind)
        self.num_gpus = count_trainer_gpus(recipe, hardware)
        self.row_tokens = recipe.task.max_prompt_tokens + recipe.sampling.max_new_tokens
        self.weight_bytes, self.compute_bytes = dtype_bytes(recipe.model.dtype), dtype_bytes(recipe.model.precision)
        # Adapters are float32 whatever the base is.
        self.trained = shape.num_lora_params or shape.num_params
        self.trained_bytes = FLOAT_BYTES if shape.num_lora_params else self.weight_bytes
        self.optimizer_floats = 2 * self.trained if recipe.train.optimizer == "adamw" else shape.adafactor_floats

    @property
    def shares_gpu_with_vllm(self) -> bool:
        return self.engine.runs_in_trainer and self.engine.needs_weight_sync

    @property
    def vllm_sleeps(self) -> bool:
        """Not in a producer, which samples during the update."""
        return self.recipe.engine.vllm.enable_sleep_mode and not self.recipe.train.staleness

    def add(self, location: Location, phase: MemoryPhase, label: str, num_bytes: float, formula: str) -> None:
        size = ceil(num_bytes)
        self.allocations.append(
            Allocation(location=location, phase=phase, label=label, num_bytes=size, formula=formula)
        )

    def add_sharded(self, phase: MemoryPhase, label: str, count: int, each: int, *, factor: str = "") -> None:
        """`count` numbers of `each` bytes, split over the training GPUs."""
        split = f" / {self.num_gpus} GPUs" if self.num_gpus > 1 else ""
        formula = f"{factor}{_count(count // 2 if factor else count)} x {each} B{split}"
        self.add("gpu", phase, label, count * each / self.num_gpus, formula)

    def add_gpu_state(self) -> None:
        """Weights, gradients and optimizer state."""
        shape = self.shape
        self.add_sharded("always", "weights", shape.num_params, self.weight_bytes)
        if shape.num_lora_params:
            self.add_sharded("always", "adapters", shape.num_lora_params, FLOAT_BYTES)
        # Gradients are freed after the update, before sampling.
        self.add_sharded("update", "gradients", self.trained, self.trained_bytes)
        if self.recipe.train.optimizer == "adamw":
            self.add_sharded("always", "AdamW moments", self.optimizer_floats, self.trained_bytes, factor="2 x ")
        else:
            self.add_sharded("always", "Adafactor rows and columns", self.optimizer_floats, self.trained_bytes)
        if self.recipe.loss.kl_coef > 0 and not shape.num_lora_params:
            self.add_sharded("always", "frozen base of the KL term", shape.num_params, self.weight_bytes)

    def add_teacher(self) -> None:
        """The frozen model of a dense target, taken to be of the policy's size, and its logits of a chunk.

        Adapters share the policy's base, unless that is sharded. Extrapolated logits have two models; the policy that
        teaches itself and a server have none.
        """
        target = self.recipe.target
        if not self.recipe.has_target:
            return
        shape, train = self.shape, self.recipe.train
        num_models = 2 if (target.teacher or "").startswith("extrapolated:logits") else 1
        if target.is_self_taught or (target.teacher or "").startswith("endpoint:"):
            pass
        elif shape.num_lora_params and self.num_gpus == 1:
            self.add_sharded("always", "teacher's adapters", num_models * shape.num_lora_params, FLOAT_BYTES)
        else:
            count = num_models * shape.num_params
            self.add_sharded("always", "teacher of the dense target", count, self.weight_bytes)
        chunk = min(train.logit_chunk_tokens, max(train.micro_batch_tokens, self.row_tokens))
        formula = f"{chunk:,} tokens x {shape.vocab_size:,} x {CHUNK_COPIES * FLOAT_BYTES} B"
        num_bytes = chunk * shape.vocab_size * CHUNK_COPIES * FLOAT_BYTES
        self.add("gpu", "update", "teacher's logits of a chunk", num_bytes, formula)

    def add_update(self) -> None:
        """Activations, logits and gathered weights of a forward and backward pass."""
        shape, train, compute = self.shape, self.recipe.train, self.compute_bytes
        tokens = max(train.micro_batch_tokens, self.row_tokens)
        per_token, terms = shape.activation_bytes, _kb(shape.activation_bytes)
        if self.recipe.model.gradient_checkpointing:
            inputs, layer = shape.checkpointed_activation_bytes, shape.layer_activation_bytes
            per_token, terms = inputs + layer, f"({_kb(inputs)} + {_kb(layer)} of one layer)"
        self.add("gpu", "update", "activations", tokens * per_token, f"{tokens:,} tokens x {terms}")
        if shape.vision_activation_bytes:
            images, each = tokens * self.recipe.task.max_prompt_tokens / self.row_tokens, shape.vision_activation_bytes
            formula = f"at most {images:,.0f} image tokens x {_kb(each)}"
            self.add("gpu", "update", "vision tower", images * each, formula)
        chunk, per_logit = min(train.logit_chunk_tokens, tokens), CHUNK_COPIES * FLOAT_BYTES + compute
        formula = f"{chunk:,} tokens x {shape.vocab_size:,} x {per_logit} B"
        self.add("gpu", "update", "logits of a chunk", chunk * shape.vocab_size * per_logit, formula)
        if self.num_gpus > 1:
            gathered = (shape.root_params + 2 * shape.largest_block_params) * (compute + self.weight_bytes)
            self.add("gpu", "update", "gathered blocks", gathered, "embedding, head and two blocks, with gradients")
        elif compute < self.weight_bytes:
            formula = f"{_count(shape.num_params)} x {compute} B"
            self.add("gpu", "update", "weights in bfloat16", shape.num_params * compute, formula)
        copied = self.trained * self.trained_bytes / self.num_gpus
        self.add("gpu", "update", "guide's part of the gradient", copied, "a copy while groups are mixed")

    def add_sampling(self) -> None:
        """The trainer's own model, or vLLM on the same GPU; an engine in its own process has its own GPUs."""
        shape, compute = self.shape, self.compute_bytes
        if self.shares_gpu_with_vllm:
            fraction = self.recipe.engine.vllm.gpu_memory_utilization
            phase = "sampling" if self.vllm_sleeps else "always"
            formula = f"engine.vllm.gpu_memory_utilization={fraction:g} of the GPU"
            self.add("gpu", phase, VLLM, int(fraction * self.hardware.gpu_bytes), formula)
            return
        # Log-probability passes, such as the check of a weight sync, gather the model with every engine.
        if self.num_gpus > 1 or compute < self.weight_bytes:
            formula = f"{_count(shape.num_params)} x {compute} B"
            self.add("gpu", "sampling", "whole weights", shape.num_params * compute, formula)
        if not self.engine.runs_in_trainer:
            return
        rows = self.count_sampled_rows(self.num_gpus)
        self.add_kv_cache("KV cache", rows)
        logits = rows * shape.vocab_size
        num_bytes = logits * compute + min(logits, CHUNK_NUMBERS) * SAMPLER_COPIES * FLOAT_BYTES
        self.add("gpu", "sampling", "logits", num_bytes, f"{rows} rows x {shape.vocab_size:,}")

    def add_producer(self) -> None:
        """With train.staleness another copy of the model, on one of the GPUs, and what it samples with during the
        update. A device of its own (engine.producer.device) is not counted."""
        shape, recipe = self.shape, self.recipe
        if not recipe.train.staleness or recipe.engine.producer.device is not None:
            return
        formula = f"{_count(shape.num_params)} x {self.weight_bytes} B"
        self.add("gpu", "always", "producer's weights", shape.num_params * self.weight_bytes, formula)
        if not self.engine.needs_weight_sync:
            self.add_kv_cache("producer's KV cache", self.count_sampled_rows(1), phase="always")

    def count_sampled_rows(self, num_gpus: int) -> int:
        rollouts = self.recipe.train.prompts_per_step * self.recipe.train.group_size
        return min(self.recipe.engine.max_num_seqs, ceil(rollouts / num_gpus))

    def add_kv_cache(self, label: str, rows: int, *, phase: MemoryPhase = "sampling") -> None:
        per_token = self.shape.kv_cache_floats * self.compute_bytes
        formula = f"{rows} rows x {self.row_tokens:,} tokens x {_kb(per_token)}"
        self.add("gpu", phase, label, rows * self.row_tokens * per_token, formula)

    def add_extrapolation(self) -> None:
        """An older checkpoint beside the policy (logits), or extrapolated weights in its place (weights)."""
        if not self.recipe.uses_extrapolation:
            return
        size, formula = self.trained * self.trained_bytes, f"{_count(self.trained)} x {self.trained_bytes} B"
        if self.recipe.extrapolation.space == "weights":
            self.add("gpu", "sampling", "extrapolated weights", size, formula)
            return
        self.add("gpu", "always", "older checkpoint", size, formula)
        self.add_kv_cache("KV cache of the older checkpoint", self.count_sampled_rows(1))

    def add_uncounted(self) -> None:
        """A tenth of each phase for what is not modelled, and the CUDA context."""
        for phase in ("always", "update", "sampling"):
            counted = sum(each.num_bytes for each in self.allocations if each.phase == phase and each.label != VLLM)
            if counted:
                self.add("gpu", phase, "uncounted", UNCOUNTED_FRACTION * counted, "a tenth of the counted")
        self.add("gpu", "always", "CUDA and NCCL", CONTEXT_BYTES, "assumed")

    def add_engine_gpu(self) -> None:
        """An engine's own GPU: its part of the weights, and a cache for at least one response."""
        if not count_engine_gpus(self.recipe):
            return
        parallel, compute, vllm = (
            self.recipe.engine.vllm.tensor_parallel_size,
            self.compute_bytes,
            self.recipe.engine.vllm,
        )
        formula = f"{_count(self.shape.num_params)} x {compute} B / {parallel}"
        self.add("engine gpu", "always", "weights", self.shape.num_params * compute / parallel, formula)
        cache = self.row_tokens * self.shape.kv_cache_floats * compute / parallel
        formula = f"{self.row_tokens:,} tokens; the remaining memory serves more responses"
        self.add("engine gpu", "always", "KV cache of one response", cache, formula)
        outside = (1 - vllm.gpu_memory_utilization) * self.hardware.gpu_bytes
        self.add("engine gpu", "always", "outside vLLM", outside, "1 - engine.vllm.gpu_memory_utilization")

    def add_host(self) -> None:
        """Host memory of one machine."""
        processes = min(self.hardware.gpus_per_machine, max(1, self.num_gpus))
        formula = f"{processes} x {PROCESS_BYTES // 10**9} GB, assumed"
        self.add("host", "always", "processes", processes * PROCESS_BYTES, formula)
        if self.num_gpus > 1 or self.recipe.train.save_in_background is False:
            size = self.trained * self.trained_bytes
            self.add("host", "saving", "gathered weights", size, "in the process that writes")
        else:
            size = (self.trained + self.optimizer_floats) * self.trained_bytes
            self.add("host", "saving", "copy of weights and moments", size, "train.save_in_background")
        if self.shares_gpu_with_vllm and self.vllm_sleeps:
            size = self.shape.num_params * self.compute_bytes * processes
            self.add("host", "update", "vLLM's weights in sleep mode", size, f"{processes} engines")

    def add_disk(self, *, autonpo: bool) -> None:
        """Checkpoints under the retention settings, logs and guide caches of the whole run.

        Each of AutoNPO's replays is a branch with its own checkpoints. Checkpoints that scoring or a rollback protects
        beyond the retention settings are not counted.
        """
        weights, state = self.trained * self.trained_bytes, self.optimizer_floats * self.trained_bytes
        for label, size, formula in estimate_disk(
            self.recipe, weights_bytes=weights, state_bytes=state, autonpo=autonpo
        ):
            self.add("disk", "always", label, size, formula)
        if not self.engine.runs_in_trainer:
            # Only a weight sync through the disk writes the weights again.
            size = self.shape.num_params * self.weight_bytes + weights
            self.add("disk", "always", "weights for the server", size, "in TMPDIR: at the start, and of one sync")


def _count(num: int) -> str:
    return f"{num / 1e9:.2f} G" if num >= 1e9 else f"{num / 1e6:.2f} M"


def _kb(num_bytes: float) -> str:
    return f"{num_bytes / 1000:,.1f} kB"
