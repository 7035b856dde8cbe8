"""vLLM in the trainer's process: continuous batching and a prefix cache, with its own copy of the weights.

It starts with dummy weights (with images: the first real ones) and samples nothing before the first weight sync. A sync
is vLLM's `reload_weights`, given the trainer's tensors under their Hugging Face names. The LM head is always sent: the
engine's config says that it is not tied to the embedding, because vLLM 0.32 does not update a tied head.
No beams, penalties, top-k or top-p: the behavior policy must be the policy itself.
"""

import copy
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.activity import SampleMeter, open_meter
from npo_cli.config.engine import EngineSettings, VllmSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import AdapterHandle, EngineInput, ModelHandle
from npo_cli.inference.process import exit_on_timeout, scratch_folder, suppress_output
from npo_cli.inference.sync_check import (
    RESUME_HINT,
    add_head,
    copy_to_cpu,
    named_tensors,
    tensor_shapes,
)
from npo_cli.inference.vllm_common import VLLM_HINT, BaseVllmEngine
from npo_cli.inference.vllm_images import IMAGE_ENGINE_OPTIONS, check_prompt_tokens, save_processor, vllm_prompts

HANG_HINT = f"raise engine.vllm.timeout if it was only slow; {RESUME_HINT}"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Adapter ranks that vLLM reserves memory for; a smaller rank is padded."""


class VllmEngine(BaseVllmEngine):
    """One `vllm.LLM`."""

    name = "vllm"

    def __init__(self, settings: EngineSettings, handle: ModelHandle) -> None:
        super().__init__(settings, handle)
        model, adapters, vision = handle.model, handle.adapters, handle.vision
        self._shapes = tensor_shapes(named_tensors(model)) if adapters is None else adapters.read_shapes()
        self._num_adapters = 0
        with scratch_folder() as folder:
            save_untied_config(model, folder)
            if vision is not None:
                save_processor(folder, handle.tokenizer, vision)
            if adapters is not None or vision is not None:
                base = named_tensors(model) if adapters is None else add_head(model, adapters.read_base())
                save_file(copy_to_cpu(base), folder / "model.safetensors")
            with (
                exit_on_timeout(self.vllm.start_timeout, phase="start", hint=VLLM_HINT),
                _preserve_random_states(),
                suppress_output(),
            ):
                self._llm = self._start(folder)

    def _replace_weights(self, tensors: dict[str, Tensor], version: str) -> None:
        self._wake("weights")
        self._llm.llm_engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        self._wake("kv_cache")
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")
        self._llm.update_weight_version(version)

    def _load_adapters(self, adapters: AdapterHandle, version: str) -> Any:
        """The request under which vLLM serves them."""
        from vllm.lora.request import LoRARequest

        self._num_adapters += 1
        # vLLM reads the files while `add_lora` runs, and never again.
        with scratch_folder() as folder:
            adapters.save(folder)
            request = LoRARequest(version, self._num_adapters, str(folder))
            if not self._llm.llm_engine.add_lora(request):
                raise RuntimeError("the adapters could not be loaded")
        return request

    def _unload_adapters(self, version: str, loaded: Any) -> None:
        self._llm.llm_engine.remove_lora(loaded.lora_int_id)

    def _sleep(self, level: int) -> None:
        self._llm.sleep(level=level)

    def close(self) -> None:
        """Shut the engine core down; its weights are in reference cycles, which only the garbage collector frees."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def _wake_up(self, tag: str) -> None:
        torch.cuda.empty_cache()
        self._llm.wake_up(tags=[tag])

    def _run(
        self,
        prompts: Sequence[EngineInput],
        fields: Sequence[dict[str, Any]],
        versions: Sequence[str | None],
        *,
        phase: str,
    ) -> list:
        from vllm import SamplingParams

        inputs = vllm_prompts(prompts, self.handle.vision)
        params = [SamplingParams(**each) for each in fields]
        loras = None if self.handle.adapters is None else [self._loaded_adapters[str(version)] for version in versions]
        with self._guarded(phase):
            meter = open_meter(len(inputs)) if phase == "sample" else None
            bar = False if meter is None else make_silent_bar(meter)
            outputs = self._llm.generate(inputs, params, lora_request=loras, use_tqdm=bar)
            check_prompt_tokens(prompts, outputs)
            return outputs

    @contextmanager
    def _guarded(self, phase: str) -> Iterator[None]:
        """Turn an exception of vLLM into an error that names the phase; end the process if vLLM hangs."""
        if self._llm is None:
            raise RunFailed(f"vLLM is closed (phase: {phase})", RESUME_HINT)
        try:
            with exit_on_timeout(self.vllm.timeout, phase=phase, hint=HANG_HINT), _preserve_random_states():
                yield
        except NpoError:
            raise
        except Exception as error:  # vLLM raises many kinds
            raise RunFailed(f"vLLM failed (phase: {phase}): {summarize_error(error)}", RESUME_HINT) from error

    def _start(self, folder: Path) -> Any:
        handle, sees_images = self.handle, self.handle.vision is not None
        prepare_environment(self.vllm)
        try:
            from vllm import LLM
        except Exception as error:  # a mismatched torchvision breaks the import with a RuntimeError
            raise NpoError(f"vllm cannot be imported: {summarize_error(error)}", VLLM_HINT) from error
        check_platform(handle.model)
        try:
            return LLM(
                model=str(folder),
                # Dummy weights would also overwrite the image normalization, which is not among the weights sent.
                load_format="dummy" if handle.adapters is None and not sees_images else "safetensors",
                **({} if handle.adapters is None else lora_options(handle.adapters, self.vllm)),
                **(IMAGE_ENGINE_OPTIONS if sees_images else {"skip_tokenizer_init": True}),
                dtype=self.dtype,
                logprobs_mode="processed_logprobs",
                enforce_eager=self.enforce_eager,
                max_model_len=handle.max_model_len,
                max_num_seqs=self.settings.max_num_seqs,
                gpu_memory_utilization=self.vllm.gpu_memory_utilization,
                enable_sleep_mode=self.can_sleep,
                enable_prefix_caching=True,
                enable_chunked_prefill=self.chunked_prefill,
                max_num_batched_tokens=self.max_batched_tokens,
                disable_log_stats=True,
                seed=0,
            )
        except Exception as error:  # vLLM raises many kinds
            raise RunFailed(f"vLLM could not start: {summarize_error(error)}", VLLM_HINT) from error


def make_silent_bar(meter: SampleMeter) -> Any:
    """A progress bar for vLLM that draws nothing, and reports the requests that vLLM counts in it as finished."""
    from tqdm import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, file=StringIO())  # tqdm ends a bar with a line of its own

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """Nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            """A bar with something to iterate counts requests that are added, one without it those that end."""
            if self.iterable is None and n:
                meter.add(int(n), 0)
            return super().update(n)

    return SilentBar


def summarize_error(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")


def save_untied_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the model's config with `tie_word_embeddings` off."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    # FSDP2 gives the model's class another name.
    config.architectures = [model.__class__.__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)


def prepare_environment(vllm: VllmSettings) -> None:
    """Set what vLLM reads from the environment when it is imported; variables that are set keep their value."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(vllm.cpu_kv_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def _preserve_random_states() -> Iterator[None]:
    """Restore the random states after the block: vLLM seeds torch, numpy and random, and draws from them."""
    import random

    import numpy

    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    # vLLM's CPU worker replaces `torch.set_num_threads` by a function that does nothing.
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


def lora_options(adapters: AdapterHandle, vllm: VllmSettings) -> dict[str, Any]:
    """vLLM's options for serving LoRA adapters."""
    return {
        "enable_lora": True,
        "max_lora_rank": round_up_lora_rank(adapters.max_rank),
        "max_loras": vllm.max_loras,
        "lora_target_modules": list(adapters.target_modules),
    }


def check_platform(model: PreTrainedModel) -> None:
    """The installed vLLM must be built for the device that the model is on."""
    from vllm.platforms import current_platform

    if current_platform.device_type != model.device.type:
        raise NpoError(
            f"this vLLM is for {current_platform.device_type or 'no device'}, and model.device is {model.device.type}",
            VLLM_HINT,
        )


def round_up_lora_rank(rank: int) -> int:
    """The smallest rank in `LORA_RANKS` that holds adapters of this rank."""
    for size in LORA_RANKS:
        if rank <= size:
            return size
    raise NpoError(
        f"vLLM supports LoRA adapters up to rank {LORA_RANKS[-1]}, got {rank}",
        "lower model.lora.rank (extrapolation.space=weights doubles it), or set engine.kind=transformers",
    )
