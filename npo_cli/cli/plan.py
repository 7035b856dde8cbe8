"""`npo plan`."""

import shutil
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import FullOpt, JsonOpt, MethodOpt, OverridesArg, RecipeArg, make_results_option
from npo_cli.cli.output import print_records
from npo_cli.types.memory import Hardware, ResourceNeed

GB = 10**9


def plan(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    *,
    gpus: Annotated[
        int, typer.Option("--gpus", min=1, metavar="N", help="Number of GPUs, those of the engine included.")
    ] = 1,
    gpu_mem: Annotated[float, typer.Option("--gpu-mem", min=0.1, metavar="GB", help="Memory per GPU.")] = 80.0,
    host_mem: Annotated[
        float | None,
        typer.Option("--host-mem", min=0.1, metavar="GB", help="Memory per machine. [default: no limit]"),
    ] = None,
    disk: Annotated[
        float | None,
        typer.Option("--disk", min=0.0, metavar="GB", help="Disk space for the run. [default: free space here]"),
    ] = None,
    per_machine: Annotated[int, typer.Option("--gpus-per-machine", min=1, metavar="N", help="GPUs per machine.")] = 8,
    method: MethodOpt = None,
    autonpo: Annotated[bool, typer.Option("--autonpo", help="Include AutoNPO's branches.")] = False,
    out: Annotated[Path | None, make_results_option("the needs of memory and disk")] = None,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Estimate GPU memory, host memory and disk space of a run.

    Counts weights, gradients, optimizer state, activations, caches and the files of the whole run. If something does
    not fit, the settings that would reduce it are listed and the exit code is 2.
    """
    hardware = Hardware(
        num_gpus=gpus,
        gpu_bytes=int(gpu_mem * GB),
        host_bytes=None if host_mem is None else int(host_mem * GB),
        disk_bytes=shutil.disk_usage(Path.cwd()).free if disk is None else int(disk * GB),
        gpus_per_machine=per_machine,
    )

    from npo_cli.memory.planner import plan_resources, validate_fits
    from npo_cli.report.conclusions import conclude_plan

    estimates = list(plan_resources(recipe, overrides or (), method=method, hardware=hardware, autonpo=autonpo))
    conclude = partial(conclude_plan, recipe)
    print_records(estimates, as_json=as_json, full=full, conclude=conclude, out=out, saved_as=ResourceNeed)
    validate_fits(estimates, hardware)
