"""The processes of `npo bench`: each command of a plan is an `npo` of its own, forked where torch is imported already.

Importing torch and transformers takes seconds of every command, about as long as twenty steps of a small model. A fork
server of `multiprocessing` imports them once and computes nothing, so that a forked command is what a fresh one would
be: its own process, session, environment and log. Elsewhere than on Linux, where a fork after such imports is not safe,
every command starts from nothing.
"""

import atexit
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from npo_cli.errors import RunFailed

PRELOADED = ("npo_cli.experiments.demo", "transformers.models.qwen3.modeling_qwen3")
"""The stages of every command, and the code of a model, which transformers imports late."""


def start_command(command: Sequence[str], *, log: Path, environment: Mapping[str, str], lock: int) -> BaseProcess:
    """One npo command in a session of its own, so that a Ctrl-C reaches it only through us.

    What it prints is added to `log`. It inherits `lock`, and ends as after SIGTERM, saved, when this process ends.
    """
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(list(PRELOADED))
    held = Connection(os.dup(lock))  # which a new process can inherit
    process = context.Process(target=run_command, args=(tuple(command), str(log), dict(environment), held))
    with hold_environment(environment):  # the fork server's is that of the first command: threads are counted at import
        try:
            process.start()
        except EOFError as error:  # of the fork server, killed for memory perhaps; the next start makes a new one
            raise RunFailed("the process that starts the commands died", "repeat the command to continue") from error
        finally:
            held.close()
    return process


def run_command(command: Sequence[str], log: str, environment: Mapping[str, str], lock: Connection) -> None:
    """The new process, until the command has ended; leaves through SystemExit. `lock` is held by being open."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.write(output, f"$ npo {shlex.join(command)}\n".encode())
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = ["npo", *command]
    try:
        runpy.run_module("npo_cli", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
        lock.close()


def end_with_parent() -> None:
    """Send this process SIGTERM when the one that started it has ended, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def hold_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """Have other variables within the block."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(environment)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
