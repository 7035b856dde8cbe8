"""Runs commands as real processes, forked from one process that has imported torch once.

A fork saves some five seconds of imports per command. In every other respect it is `python -m PACKAGE ARGV`, with its
own process id, signals and death. Only the job of two processes is started by torchrun.
"""

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.values.commands import COMMANDS, PACKAGE, RECIPES, TINY_VL, fill, setting_arguments

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240.0
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", PACKAGE]


def import_heavy_libraries() -> None:
    """Import what every command imports; computes nothing and starts no thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import scipy.stats  # noqa: F401
    import torch  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401


def arguments(command: str, settings: Mapping[str, object] | None = None, /, **blanks: object) -> list[str]:
    """The argv of a command of the table; a recipe is given by its neutral name."""
    if "recipe" in blanks:
        blanks["recipe"] = RECIPES[str(blanks["recipe"])]
    return fill(COMMANDS[command], **blanks) + setting_arguments(settings or {})


def run(command: str, settings: Mapping[str, object] | None = None, /, *, log: Path, **blanks: object) -> list[Any]:
    """Run a command to its successful end; returns the JSON lines of its stdout, where it printed any."""
    argv = arguments(command, settings, **blanks)
    _check(_wait(start(argv, log=log)), argv, log)
    lines = log.with_suffix(".out").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def start(argv: list[str], *, log: Path) -> int:
    """Fork a process that executes `python -m PACKAGE ARGV`; stderr goes to `log`, stdout beside it. Returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        _redirect(log)
        sys.argv = [PACKAGE, *argv]
        runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_and_kill(argv: list[str], *, when: Callable[[], bool], log: Path) -> None:
    """Start a command and kill it with signal 9 as soon as `when` holds; it must not have ended before."""
    pid = start(argv, log=log)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not when():
        if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() > deadline:
            raise RuntimeError(f"the command to be killed ended or stalled: {argv}\n{log.read_text()}")
        time.sleep(0.002)
    os.kill(pid, 9)
    if (code := _wait(pid)) != -9:
        raise RuntimeError(f"the command ended with {code} before it could be killed: {argv}")


def run_in_two_processes(command: str, settings: Mapping[str, object], /, *, log: Path, **blanks: object) -> None:
    """The same command under torchrun, two processes."""
    argv = arguments(command, settings, **blanks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        ended = subprocess.run([*TORCHRUN, *argv], cwd=ROOT, env=environment, stdout=output, stderr=output)
    _check(ended.returncode, argv, log)


def make_tiny_vl(out: Path, *, log: Path) -> None:
    """The tiny Qwen3-VL of the recipes, after 30 steps of supervised learning."""
    argv = [sys.executable, *fill(TINY_VL, out=out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        ended = subprocess.run(argv, cwd=ROOT, env=environment, stdout=output, stderr=output)
    _check(ended.returncode, argv, log)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _check(code: int, argv: list[str], log: Path) -> None:
    if code:
        raise RuntimeError(f"exit code {code} of {' '.join(map(str, argv))}\n{log.read_text()[-3000:]}")


def _redirect(log: Path) -> None:
    for stream, path in ((0, Path(os.devnull)), (1, log.with_suffix(".out")), (2, log)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), stream)
