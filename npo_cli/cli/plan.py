"""`npo plan`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import JsonOpt, OverridesArg
from npo_cli.cli.output import print_records
from npo_cli.types.memory import Hardware

GB = 10**9


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a file.")],
    overrides: OverridesArg = None,
    *,
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="GPUs in all, an engine's own included.")] = 1,
    gpu_mem: Annotated[float, typer.Option("--gpu-mem", min=0.1, metavar="GB", help="Memory of each GPU.")] = 80.0,
    host_mem: Annotated[
        float | None,
        typer.Option("--host-mem", min=0.1, metavar="GB", help="Memory of each machine. [default: no limit]"),
    ] = None,
    disk: Annotated[
        float | None,
        typer.Option("--disk", min=0.0, metavar="GB", help="Room for the run. [default: what is free here]"),
    ] = None,
    per_machine: Annotated[int, typer.Option("--gpus-per-machine", min=1, metavar="N", help="GPUs of a machine.")] = 8,
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="With this method on top.")] = None,
    autonpo: Annotated[bool, typer.Option("--autonpo", help="With AutoNPO's replays.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Estimate memory and disk before anything is loaded.

    Weights, gradients, optimiser, activations, caches and the whole run's disk. What cannot fit is refused, with the
    settings that would help.
    """
    footing = Hardware(
        num_gpus=gpus,
        gpu_bytes=int(gpu_mem * GB),
        host_bytes=None if host_mem is None else int(host_mem * GB),
        disk_bytes=shutil.disk_usage(Path.cwd()).free if disk is None else int(disk * GB),
        gpus_per_machine=per_machine,
    )

    from npo_cli.memory.planner import plan_resources, validate_fits

    found = list(plan_resources(recipe, overrides or (), method=method, hardware=footing, autonpo=autonpo))
    print_records(found, as_json=as_json)
    validate_fits(found, footing)
