"""Sampling from the trainer's own model, with a decode loop of our own.

Each response belongs to a seed: it depends on that and, up to float rounding, not on the rest of the batch; its
log-probabilities come for free.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.activity import open_meter
from npo_cli.config.engine import EngineSettings
from npo_cli.errors import NpoError
from npo_cli.inference.base import (
    Engine,
    EngineStatus,
    LogprobRequest,
    ModelHandle,
    Sample,
    SampleRequest,
)
from npo_cli.inference.decoding import DecodedModel, Decoding, SamplingCost
from npo_cli.inference.kv_cache import Window


class TransformersEngine(Engine):
    """Samples from the trainer's own model, so there are no weights to synchronize."""

    name = "transformers"
    needs_weight_sync = False
    supports_images = True
    serves_adapters = True

    def __init__(self, settings: EngineSettings, handle: ModelHandle) -> None:
        super().__init__(settings, handle)
        self.model = handle.model
        self.cost = SamplingCost()
        self.forward: Callable[..., Any] = compile_forward(self.model) if settings.compile else self.model

    @classmethod
    def status(cls, required: Mapping[str, SpecifierSet]) -> EngineStatus:
        """Always available."""
        return EngineStatus(kind=cls.name, is_available=True, detail="the trainer's own model samples")

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order; requests with the same prompt share its prefill."""
        meter = open_meter(len(requests))
        if not requests:
            return []
        decoding = Decoding(
            requests,
            self.handle,
            open_models=self._open_models,
            combine=self._combine,
            max_num_rows=self.settings.max_num_seqs,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            cost=self.cost,
            meter=meter,
        )
        with self._precision():
            return decoding.run()

    @torch.no_grad()
    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """One plain forward pass per response."""
        logps = []
        for request in requests:
            ids_1L = torch.tensor([request.prompt_ids + request.response_ids], device=self.model.device)
            with self._precision():
                logits_LW = self._logits(ids_1L)[0]
            logps_LW = torch.log_softmax(logits_LW, dim=-1)
            first, response = len(request.prompt_ids), ids_1L[0, len(request.prompt_ids) :]
            logps.append(tuple(logps_LW[first - 1 : -1].gather(1, response[:, None])[:, 0].tolist()))
        return logps

    def _precision(self) -> torch.autocast:
        """The trainer's precision: bfloat16 autocast over float32 weights where the trainer uses that."""
        dtype = self.handle.dtype
        return torch.autocast(self.model.device.type, dtype=dtype, enabled=dtype != self.model.dtype)

    def _logits(self, ids_1L: Tensor) -> Tensor:
        """Logits at every position, in float32."""
        return self.model(ids_1L).logits.float()

    def _open_models(self, window: Window, num_rows: int) -> list[DecodedModel]:
        """The models whose logits are combined, each with its own KV cache."""
        return [DecodedModel(self.handle, self.forward, window, num_rows=num_rows)]

    def _combine(self, logits: Sequence[Tensor]) -> Tensor:
        """The logits of the distribution that is sampled `(N, W)`."""
        return logits[0]


def compile_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward pass, compiled when it is first called, for any number of rows and columns."""
    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise NpoError(
            f"engine.compile=true needs a C++ compiler on a CPU, and {compiler} is not installed",
            "install g++, or set engine.compile=false",
        )
    compiled: Any = torch.compile(type(model).forward, dynamic=True)
    return compiled.__get__(model)
