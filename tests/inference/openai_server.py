"""A real HTTP server that answers like OpenAI's API, and fails when it is told to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Responder = Callable[[dict[str, Any]], dict[str, Any]]
"""From a request's body to a choice of the answer, perhaps with `usage`."""


@dataclass(kw_only=True)
class ServerState:
    """What the server is asked, and how it behaves."""

    say: Responder
    model: str = "teacher"
    failures: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    """Status, headers and body of the next answers; the server is itself again when they are used up."""
    broken: bytes | None = None
    """Said instead of JSON."""
    raw: bytes | None = None
    """Sent instead of status line, headers and body."""
    drip: bool = False
    """`raw` is sent again and again, a byte every 0.05 s, until the client hangs up."""
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    num_in_flight: int = 0
    max_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    served: ServerState

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": self.served.model, "object": "model"}]})

    def do_POST(self) -> None:
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.lock:
            served.bodies.append(body)
            served.num_in_flight += 1
            served.max_in_flight = max(served.max_in_flight, served.num_in_flight)
        said = served.say(body)
        with served.lock:
            served.num_in_flight -= 1
        usage = said.pop("usage", None)
        self._answer({"choices": [said]} | ({"usage": usage} if usage else {}))

    def _answer(self, content: dict[str, Any]) -> None:
        served = self.served
        with served.lock:
            served.paths.append(self.path)
            served.keys.append(self.headers.get("Authorization"))
            failure = served.failures.pop(0) if served.failures else None
        if served.raw is not None:
            with suppress(OSError):
                self._send_raw(served.raw)
            self.close_connection = True
            return
        status, headers, data = failure or (200, {}, served.broken or json.dumps(content).encode())
        if status == 0:  # hang up
            self.connection.close()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # nobody listens any more
            self.wfile.write(data)

    def _send_raw(self, data: bytes) -> None:
        while self.served.drip:
            for number in data:
                self.connection.sendall(bytes([number]))
                time.sleep(0.05)
        self.connection.sendall(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def run_server(say: Responder, **options: Any) -> Iterator[ServerState]:
    """The server, for the block."""
    served = ServerState(say=say, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
