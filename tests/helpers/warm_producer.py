"""Real producers that start at once: one process imports everything, and forks a producer for each connection.

A forked producer is what a fresh one would be: its own pid, its own death. The tests of processes start fresh ones.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO


class ForkedProducer:
    """What is used of `subprocess.Popen`, of a process that another one waits for."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._replies = channel.makefile("r")
        self.pid = int(self._replies.readline())
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._channel.setblocking(False)
            with contextlib.suppress(BlockingIOError, OSError):
                if self._channel.recv(1, socket.MSG_PEEK):
                    self._channel.setblocking(True)
                    self.wait()
            self._channel.setblocking(True)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._channel.settimeout(timeout)
            try:
                self._code = int(self._replies.readline())
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("producer", timeout or 0) from error
        return self._code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def start_producer_server(address: Path) -> Iterator[None]:
    """The server for the block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__, str(address)], env=environment, **pipes) as server:
        try:
            assert server.stdout.readline() == "ready\n"
            yield
        finally:
            server.stdin.close()
            address.unlink(missing_ok=True)


def fork_producers(address: str) -> Callable[[Connection, Connection, BinaryIO], ForkedProducer]:
    """In the place of `npo_cli.session.producer.start_process`."""

    def start(channel: Connection, lifeline: Connection, output: BinaryIO) -> ForkedProducer:
        server = socket.socket(socket.AF_UNIX)
        server.connect(address)
        socket.send_fds(server, [b"fds"], [channel.fileno(), lifeline.fileno(), output.fileno()])
        return ForkedProducer(server)

    return start


def serve(address: str) -> None:
    """Fork for each connection until stdin closes."""
    # Models of transformers are imported when first loaded; this loads one without computing anything.
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import npo_cli.session.producer_process  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            supervise(client)
            os._exit(0)
        client.close()


def supervise(client: socket.socket) -> None:
    """Fork the producer, say its pid, and later its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, (channel, lifeline, output), *_ = socket.recv_fds(client, 16, 3)
    pid = os.fork()
    if pid == 0:
        from npo_cli.session.producer_process import serve as serve_samples

        os.setsid()
        client.close()
        for number in (1, 2):
            os.dup2(output, number)
        code = 1
        try:
            serve_samples(channel, lifeline)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        os._exit(code)
    for number in (channel, lifeline, output):
        os.close(number)
    with contextlib.suppress(OSError):  # the requesting process may be gone
        client.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1])
