"""The checks of `npo doctor`: they change nothing and need no network.

Supported versions are read from the package's own requirements, installed ones from the metadata of the packages. Only
the full check imports torch and tries the engines.
"""

import importlib.metadata
import os
import platform
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.requirements import Requirement

from npo_cli.config.engine import VLLM_PACKAGES
from npo_cli.config.locate import list_recipe_names
from npo_cli.distributed.launch import read_launch_info
from npo_cli.registry import ENGINES
from npo_cli.report.table import format_bytes
from npo_cli.types.views import DoctorCheck

NEEDED_MEMORY = 1_000_000_000
NEEDED_DISK = 1_000_000_000
DRIVER_FOLDER = Path("/proc/driver/nvidia")
VLLM_ENGINES = ("vllm", "vllm_server")
DEVELOPER_EXTRAS = {"test", "dev"}
"""Extras for developing npo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageRequirements:
    """Requirements of the package."""

    python: str
    requirements: tuple[Requirement, ...]
    """Requirements of an extra have a marker with its name."""


def run_checks(*, full: bool = False) -> list[DoctorCheck]:
    """Every check, required ones first; `full` imports torch and tries the engines."""
    package = read_requirements()
    return [
        python_check(package.python),
        *(package_check(requirement) for requirement in package.requirements if _extra(requirement) is None),
        *(torch_checks() if full else []),
        *(gpu_checks() if full else driver_checks()),
        process_check(),
        memory_check(),
        disk_check(Path.cwd()),
        base_check(),
        DoctorCheck(name="recipes", is_ok=bool(list_recipe_names()), detail=f"{len(list_recipe_names())} shipped"),
        *(
            package_check(requirement)
            for requirement in package.requirements
            if _extra(requirement) not in {None, *DEVELOPER_EXTRAS, *VLLM_PACKAGES}
        ),
        *(engine_checks(package) if full else installed_engine_checks(package)),
    ]


def engine_checks(package: PackageRequirements) -> list[DoctorCheck]:
    """Which engine.kind works: each engine is tried, vLLM by a trial import."""
    from npo_cli.inference.base import check_engines

    ranges = {each.name: each.specifier for each in package.requirements if each.name in VLLM_PACKAGES}
    return [
        DoctorCheck(
            name=f"engine {each.kind}", is_ok=each.is_available, detail=each.detail, hint=each.hint, is_required=False
        )
        for each in check_engines(ranges)
    ]


def installed_engine_checks(package: PackageRequirements) -> Iterator[DoctorCheck]:
    """Which engine.kind is installed, by the versions of the packages alone."""
    vllm = next(
        (
            package_check(each)
            for each in package.requirements
            if each.name in VLLM_PACKAGES and installed_version(each.name) is not None
        ),
        None,
    )
    for kind in ENGINES.names():
        if kind not in VLLM_ENGINES:
            detail = "the trainer's own model samples" if kind == "transformers" else "a plug-in, not tried"
            yield DoctorCheck(name=f"engine {kind}", is_ok=True, detail=detail, is_required=False)
            continue
        is_ok = vllm is not None and vllm.is_ok
        named = " or without a GPU ".join(
            f"'{each.name}{each.specifier}'" for each in package.requirements if each.name in VLLM_PACKAGES
        )
        yield DoctorCheck(
            name=f"engine {kind}",
            is_ok=is_ok,
            detail="vllm is not installed" if vllm is None else f"{vllm.name} {vllm.detail}",
            hint=f"pip install {named}" if vllm is None else vllm.hint,
            is_required=False,
        )


def read_requirements() -> PackageRequirements:
    """Requirements from the metadata of the installed package; in a source checkout from pyproject.toml."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {})
        texts = [
            *project["dependencies"],
            *(f"{one}; extra == '{name}'" for name, some in extras.items() for one in some),
        ]
        python = project["requires-python"]
    else:
        name = importlib.metadata.packages_distributions()["npo_cli"][0]
        texts = importlib.metadata.requires(name) or []
        python = importlib.metadata.metadata(name)["Requires-Python"]
    return PackageRequirements(python=python, requirements=tuple(map(Requirement, texts)))


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to; None for a core requirement."""
    text = str(requirement.marker or "")
    return text.rpartition("extra == ")[2].strip("\"' ") if "extra == " in text else None


def python_check(supported: str) -> DoctorCheck:
    """Compare the interpreter with the supported range."""
    found = platform.python_version()
    return _version_check(
        "python", found=found, requirement=Requirement(f"python{supported}"), hint="use a Python version in that range"
    )


def package_check(requirement: Requirement) -> DoctorCheck:
    """Compare an installed package with its range; extras are optional."""
    extra = _extra(requirement)
    group = "packages" if extra is None else "extras"
    range_ = f"{requirement.name}{requirement.specifier}"
    found = installed_version(requirement.name)
    if found is None:
        detail = "not installed" if extra is None else f"not installed (extra {extra})"
        return DoctorCheck(
            name=requirement.name, is_ok=False, detail=detail, hint=f"pip install '{range_}'", is_required=extra is None
        )
    check = _version_check(requirement.name, found=found, requirement=requirement, hint=f"pip install '{range_}'")
    return replace(check, group=group)


def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_check(name: str, *, found: str, requirement: Requirement, hint: str) -> DoctorCheck:
    if requirement.specifier.contains(found, prereleases=True):
        return DoctorCheck(name=name, is_ok=True, detail=found)
    return DoctorCheck(name=name, is_ok=False, detail=f"{found}, but {requirement.specifier} is required", hint=hint)


def torch_checks() -> Iterator[DoctorCheck]:
    """Whether torch and transformers import (a mismatched torchvision breaks them), threads, and GPUs."""
    try:
        import torch
        from transformers import AutoModelForCausalLM  # noqa: F401 - its import is the check
    except Exception as error:  # any failure of these imports is what is checked
        hint = "pip uninstall torchvision torchaudio torchcodec   # builds that do not match torch break the import"
        yield DoctorCheck(name="import", is_ok=False, detail=f"{type(error).__name__}: {error}", hint=hint)
        return
    cores = os.cpu_count() or 1
    yield DoctorCheck(
        name="import", is_ok=True, detail=f"torch and transformers import; {torch.get_num_threads()} of {cores} threads"
    )


def gpu_checks() -> Iterator[DoctorCheck]:
    """The GPUs that torch finds."""
    try:
        import torch
    except Exception:  # reported by `torch_checks`
        return
    if not torch.cuda.is_available():
        yield DoctorCheck(
            name="gpu", is_ok=False, is_required=False, detail="none available to torch: training runs on the CPU"
        )
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield DoctorCheck(
            name=f"gpu {index}", is_ok=True, is_required=False, detail=f"{card.name}, {format_bytes(card.total_memory)}"
        )


def driver_checks(driver: Path = DRIVER_FOLDER) -> Iterator[DoctorCheck]:
    """The GPUs that NVIDIA's driver lists, and whether the installed build of torch can use them."""
    cards = sorted(driver.glob("gpus/*/information"))
    is_cpu_build = (installed_version("torch") or "").endswith("+cpu")
    if not cards:
        yield DoctorCheck(name="gpu", is_ok=False, is_required=False, detail="no NVIDIA GPU: training runs on the CPU")
    for index, card in enumerate(cards):
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "unknown model")
        yield DoctorCheck(
            name=f"gpu {index}",
            is_ok=not is_cpu_build,
            is_required=False,
            detail=f"{model}, but torch is a CPU build" if is_cpu_build else model,
            hint="pip install torch   # a build for GPUs" if is_cpu_build else "",
        )


def process_check() -> DoctorCheck:
    """Number of processes that a launcher started."""
    launch = read_launch_info()
    started = (
        "1 (torchrun starts several)"
        if launch is None
        else f"{launch.world_size}, {launch.local_world_size} on this machine"
    )
    return DoctorCheck(name="processes", is_ok=True, is_required=False, detail=started)


def usable_memory() -> int:
    """Memory of the machine, or of the container if that is less, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def memory_check() -> DoctorCheck:
    """Memory available to this process."""
    usable = usable_memory()
    hint = "" if usable >= NEEDED_MEMORY else f"the micro task needs about {format_bytes(NEEDED_MEMORY)}"
    return DoctorCheck(name="memory", is_ok=not hint, detail=format_bytes(usable), hint=hint)


def disk_check(folder: Path) -> DoctorCheck:
    """Free space in the current folder."""
    free = shutil.disk_usage(folder).free
    hint = "" if free >= NEEDED_DISK else "free some space, or create runs on another disk"
    return DoctorCheck(name="disk", is_ok=not hint, detail=f"{format_bytes(free)} free here", hint=hint)


def base_check() -> DoctorCheck:
    """The model that is part of the package."""
    folder = Path(__file__).parents[1] / "assets" / "micro-base"
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        return DoctorCheck(
            name="micro-base", is_ok=False, detail=f"missing: {', '.join(missing)}", hint="reinstall the package"
        )
    return DoctorCheck(
        name="micro-base", is_ok=True, detail=format_bytes((folder / "model.safetensors").stat().st_size)
    )
