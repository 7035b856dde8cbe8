"""vLLM in this process: continuous batching and a prefix cache, with weights of its own that are replaced in place.

It starts with made-up weights, or where it sees pictures with the first ones, and answers nothing until real ones were
given. Transport is vLLM's `reload_weights`, fed with the trainer's tensors under their Hugging Face names. The head is
always sent: the engine is told that it is not tied, because a tied one would silently keep its old values.
Left out: beams, penalties, top-k and top-p. The behaviour law must be the policy's own.
"""

import copy
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import AdapterHandle, EngineInput, VisionProcessor, round_up_lora_rank
from npo_cli.inference.process import exit_on_timeout, scratch_folder, suppress_output
from npo_cli.inference.sync_check import (
    RESUME_HINT,
    add_head,
    check_sent_tensors,
    copy_to_cpu,
    named_tensors,
    tensor_shapes,
)
from npo_cli.inference.vllm_common import BaseVllmEngine, VllmLimits
from npo_cli.inference.vllm_images import IMAGE_ENGINE_OPTIONS, check_prompt_tokens, save_processor, vllm_prompts

VLLM_HINT = "npo doctor tells what is missing; engine.kind=transformers needs no vLLM"
HANG_HINT = f"raise engine.vllm.timeout if it was only slow; {RESUME_HINT}"


SLEEP_TAGS = frozenset({"weights", "kv_cache"})
"""What sleep level 2 gives back, in vLLM's words."""


class VllmEngine(BaseVllmEngine):
    """One `vllm.LLM`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limits: VllmLimits,
        adapters: AdapterHandle | None = None,
        vision: VisionProcessor | None = None,
    ) -> None:
        self.tokenizer, self.limits, self.adapters, self.vision = tokenizer, limits, adapters, vision
        self.version: str | None = None
        self._shapes = tensor_shapes(named_tensors(model)) if adapters is None else adapters.read_shapes()
        self._asleep: frozenset[str] = frozenset()
        self._held: dict[str, Any] = {}
        self._num_adapters = 0
        with scratch_folder() as folder:
            save_untied_config(model, folder)
            if vision is not None:
                save_processor(folder, tokenizer, vision)
            if adapters is not None or vision is not None:
                base = named_tensors(model) if adapters is None else add_head(model, adapters.read_base())
                save_file(copy_to_cpu(base), folder / "model.safetensors")
            with (
                exit_on_timeout(limits.start_timeout, phase="start", hint=VLLM_HINT),
                _own_random_streams(),
                suppress_output(),
            ):
                self._llm = _start(folder, model, limits=limits, adapters=adapters, sees=vision is not None)

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Replace every tensor, forget every cached prefix, stamp the version; or put adapters beside the others."""
        if self.adapters is not None:
            self._take_adapters(self.adapters, version)
            return
        tensors = named_tensors(model)
        check_sent_tensors(self._shapes, tensors)
        with self._working("take weights"):
            self._wake("weights")
            self.version = None
            self._llm.llm_engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
            self._wake("kv_cache")
            self._llm.llm_engine.reset_encoder_cache()
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache of the old weights could not be dropped")
            self._llm.update_weight_version(version)
        self.version = version

    def _take_adapters(self, port: AdapterHandle, version: str) -> None:
        """A slot of their own under a number that nobody had before; the oldest make room.

        vLLM's prefix cache tells adapters apart, so nothing has to be forgotten.
        """
        from vllm.lora.request import LoRARequest

        check_sent_tensors(self._shapes, port.read_adapters(), shapes=port.read_shapes())
        with self._working("take adapters"):
            self._wake("weights")
            self._wake("kv_cache")
            self.version = None
            while len(self._held) >= self.limits.max_loras:
                oldest = self._held.pop(next(iter(self._held)))
                self._llm.llm_engine.remove_lora(oldest.lora_int_id)
            self._num_adapters += 1
            # Read once, here.
            with scratch_folder() as folder:
                port.save(folder)
                request = LoRARequest(version, self._num_adapters, str(folder))
                if not self._llm.llm_engine.add_lora(request):
                    raise RuntimeError("the adapters were not taken")
            self._held[version] = request
        self.version = version

    def release_memory(self) -> None:
        """Drop weights and cache from the GPU; they are sent again anyway. Nothing on a CPU, where vLLM cannot.

        The base beside adapters is never sent again: it waits in the CPU's memory.
        """
        if self.limits.can_sleep and not self._asleep:
            with self._working("go to sleep"):
                self._llm.sleep(level=2 if self.adapters is None else 1)
            self._asleep, self.version = SLEEP_TAGS, None

    def close(self) -> None:
        """Shut the engine core down; its weights and cache hang in circles that only a collection frees."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def _wake(self, part: str) -> None:
        """One part of the memory that `rest` gave back; the update's own leftovers make room for it."""
        if part in self._asleep:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=[part])
            self._asleep = self._asleep - {part}

    def _answers(
        self,
        prompts: Sequence[EngineInput],
        fields: Sequence[dict[str, Any]],
        versions: Sequence[str | None],
        *,
        phase: str,
    ) -> list:
        from vllm import SamplingParams

        asked = vllm_prompts(prompts, self.vision)
        params = [SamplingParams(**each) for each in fields]
        beside = None if self.adapters is None else [self._held[str(version)] for version in versions]
        with self._working(phase):
            outputs = self._llm.generate(asked, params, lora_request=beside, use_tqdm=False)
            check_prompt_tokens(prompts, outputs)
            return outputs

    @contextmanager
    def _working(self, phase: str) -> Iterator[None]:
        """A dead engine is told by phase and cause; a hung one ends the process."""
        if self._llm is None:
            raise RunFailed(f"the engine was closed before it was to {phase}", RESUME_HINT)
        try:
            with exit_on_timeout(self.limits.deadline, phase=phase, hint=HANG_HINT), _own_random_streams():
                yield
        except NpoError:
            raise
        except Exception as error:  # whatever a foreign engine dies of is the finding
            raise RunFailed(f"vLLM failed while it was to {phase}: {summarize_error(error)}", RESUME_HINT) from error


def summarize_error(error: Exception) -> str:
    """The kind of error and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")


def save_untied_config(model: PreTrainedModel, folder: Path) -> None:
    """The model's config as an engine should read it: head and embedding apart."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    # A model in shards is of a class that FSDP2 made.
    config.architectures = [model.__class__.__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)


def prepare_environment(limits: VllmLimits) -> None:
    """What vLLM reads from the environment before it is imported; a value that is there stays."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(limits.cpu_kv_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


@contextmanager
def _own_random_streams() -> Iterator[None]:
    """vLLM seeds torch, numpy and random, and draws from them; the trainer's streams go on as if it had not."""
    import random

    import numpy

    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    # vLLM's worker for CPUs puts a function that does nothing in the place of this one.
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if cards:
            torch.cuda.set_rng_state_all(cards)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


def lora_options(adapters: AdapterHandle, limits: VllmLimits) -> dict[str, Any]:
    """Slots for adapters beside the base, in vLLM's words."""
    return {
        "enable_lora": True,
        "max_lora_rank": round_up_lora_rank(adapters.max_rank),
        "max_loras": limits.max_loras,
        "lora_target_modules": list(adapters.target_modules),
    }


def check_platform(model: PreTrainedModel) -> None:
    """A vLLM built for CPUs serves a model on a CPU, one for GPUs a model on a GPU."""
    from vllm.platforms import current_platform

    if current_platform.device_type != model.device.type:
        raise NpoError(
            f"this vLLM is for {current_platform.device_type or 'no device'}, and model.device is {model.device.type}",
            VLLM_HINT,
        )


def _start(
    folder: Path, model: PreTrainedModel, *, limits: VllmLimits, adapters: AdapterHandle | None, sees: bool
) -> Any:
    prepare_environment(limits)
    try:
        from vllm import LLM
    except Exception as error:  # a mismatched torchvision breaks the import with a RuntimeError
        raise NpoError(f"vllm cannot be imported: {summarize_error(error)}", VLLM_HINT) from error
    check_platform(model)
    try:
        return LLM(
            model=str(folder),
            # Made-up weights would also make up how a picture is normalised, which is never sent.
            load_format="dummy" if adapters is None and not sees else "safetensors",
            **({} if adapters is None else lora_options(adapters, limits)),
            **(IMAGE_ENGINE_OPTIONS if sees else {"skip_tokenizer_init": True}),
            dtype=limits.dtype,
            logprobs_mode="processed_logprobs",
            enforce_eager=limits.enforce_eager,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            gpu_memory_utilization=limits.gpu_memory_utilization,
            enable_sleep_mode=limits.can_sleep,
            enable_prefix_caching=True,
            enable_chunked_prefill=limits.chunked_prefill,
            max_num_batched_tokens=limits.max_batched_tokens,
            disable_log_stats=True,
            seed=0,
        )
    except Exception as error:  # whatever a foreign engine dies of is the finding
        raise RunFailed(f"vLLM could not start: {summarize_error(error)}", VLLM_HINT) from error
