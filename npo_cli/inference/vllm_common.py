"""What vLLM is asked and what it answers, in process or over HTTP: the same few fields either way."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from npo_cli.errors import RunFailed
from npo_cli.inference.base import AdapterHandle, EngineInput, LogprobRequest, Sample, SampleRequest, VisionProcessor
from npo_cli.inference.sync_check import RESUME_HINT
from npo_cli.inference.vllm_images import suppression_fields

NONDETERMINISM_WARNING = (
    "vLLM on a GPU may answer a seed differently from batch to batch: a resumed run goes on, but not bit for bit "
    "(VLLM_BATCH_INVARIANT=1 where vLLM supports it)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmLimits:
    """What a vLLM engine may take, and how long."""

    eos_ids: tuple[int, ...]
    max_model_len: int
    """Prompt and response together, in tokens."""
    dtype: str
    """In which the engine computes: the trainer's own."""
    max_num_seqs: int
    tensor_parallel_size: int
    data_parallel_size: int
    gpu_memory_utilization: float
    cpu_kv_cache_gb: int
    devices: str
    """CUDA_VISIBLE_DEVICES of a server; empty leaves it alone."""
    on_cpu: bool
    enforce_eager: bool
    can_sleep: bool
    max_loras: int
    """Of one base, side by side."""
    start_timeout: float
    """Seconds."""
    deadline: float
    """Seconds a batch or a sync may take."""

    @property
    def chunked_prefill(self) -> bool:
        """Not on a CPU: after part of a prompt vLLM rewinds the request's random stream, which a CPU's cannot."""
        return not self.on_cpu

    @property
    def max_batched_tokens(self) -> int | None:
        """A whole prompt fits into one pass where prompts are not cut; None leaves it to vLLM."""
        return max(4096, self.max_model_len) if self.on_cpu else None


def sampling_fields(
    request: SampleRequest, *, temperature: float, max_new_tokens: int, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """The whole law at that temperature, the request's own seed, the log-probability of each token drawn."""
    return {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": max_new_tokens,
        "seed": request.seed,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def logprob_fields() -> dict[str, Any]:
    """One token is the least that may be asked for; only the prompt's log-probabilities are wanted."""
    return {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}


def parse_sample(
    request: SampleRequest, output: Any, *, eos_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Sample:
    """One answer; a response that vLLM gave up on is nobody's finished sample."""
    answer = output.outputs[0]
    ids = tuple(answer.token_ids)
    if answer.finish_reason not in ("stop", "length") or not ids:
        raise RunFailed(
            f"vLLM ended the response to {request.prompt_id} with {answer.finish_reason!r} after {len(ids)} tokens",
            RESUME_HINT,
        )
    logps = tuple(place[token].logprob for place, token in zip(answer.logprobs, ids, strict=True))
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
    """The response's part of a prefill's log-probabilities."""
    first = len(request.prompt_ids)
    places = prompt_logprobs[first:]
    return tuple(place[token].logprob for place, token in zip(places, request.response_ids, strict=True))


def check_versions(outputs: Sequence[Any], versions: Sequence[str | None], *, uses_adapters: bool) -> None:
    """Every token of every answer was sampled by the weights that were asked.

    Adapters are named by the request that came back with the answer: beside them the base has one version for ever.
    """
    for output, version in zip(outputs, versions, strict=True):
        seen = {span.version for span in output.outputs[0].weight_versions or ()}
        if uses_adapters:
            seen = set() if output.lora_request is None else {output.lora_request.lora_name}
        if version is None or seen != {version}:
            told = ", ".join(sorted(seen)) or "of no version"
            raise RunFailed(f"the engine answered with weights {told}, not with {version}", RESUME_HINT)


class BaseVllmEngine(ABC):
    """What both kinds of vLLM have in common: how they are asked, and what is checked of an answer."""

    has_own_weights = True
    tokenizer: PreTrainedTokenizerBase
    limits: VllmLimits
    version: str | None
    adapters: AdapterHandle | None
    vision: VisionProcessor | None
    """How it is shown pictures; None where the model reads text alone."""
    _held: dict[str, Any]
    """Adapters by the version they were given as, the oldest first."""

    @property
    def num_versions(self) -> int:
        """Adapters stand side by side; whole weights replace each other."""
        return 1 if self.adapters is None else self.limits.max_loras

    @property
    def reproducibility_warning(self) -> str:
        """Seeds are kept on a CPU; on a GPU the batch has a say."""
        invariant = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        return "" if self.limits.on_cpu or invariant else NONDETERMINISM_WARNING

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample a request, in order; a finished one leaves the batch at once and makes room."""
        law = {"temperature": temperature, "max_new_tokens": max_new_tokens, "eos_ids": self.limits.eos_ids}
        fields = [sampling_fields(request, **law) | suppression_fields(self.vision) for request in requests]
        versions = [request.version or self.version for request in requests]
        self._refuse_let_go(versions)
        prompts = [EngineInput(token_ids=request.prompt_ids, images=request.images) for request in requests]
        outputs = self._answers(prompts, fields, versions, phase="sample")
        check_versions(outputs, versions, uses_adapters=self.adapters is not None)
        return [
            parse_sample(request, output, eos_ids=self.limits.eos_ids, tokenizer=self.tokenizer)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _refuse_let_go(self, versions: Sequence[str | None]) -> None:
        """vLLM would wait for ever for adapters that were let go."""
        for version in () if self.adapters is None else dict.fromkeys(versions):
            if version not in self._held:
                raise RunFailed(f"the engine was asked for weights {version}, which it does not hold", RESUME_HINT)

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """One prefill a trajectory, which must be shorter than the longest that is allowed: vLLM adds a token."""
        prompts = [EngineInput(token_ids=each.prompt_ids + each.response_ids, images=each.images) for each in requests]
        versions = [self.version] * len(requests)
        outputs = self._answers(prompts, [logprob_fields() for _ in requests], versions, phase="score")
        check_versions(outputs, versions, uses_adapters=self.adapters is not None)
        return [parse_logps(request, output.prompt_logprobs) for request, output in zip(requests, outputs, strict=True)]

    @abstractmethod
    def _answers(
        self,
        prompts: Sequence[EngineInput],
        fields: Sequence[dict[str, Any]],
        versions: Sequence[str | None],
        *,
        phase: str,
    ) -> list:
        """One output of vLLM a prompt, in order; `fields` are those of its SamplingParams."""
