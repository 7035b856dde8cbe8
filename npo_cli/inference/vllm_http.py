"""Small parts of talking to a vLLM server on this machine: a port, a session with a key, options, its answers.

The key of vLLM's server, asked for at every door: vLLM itself guards some, and not those that change weights.

Loaded by the server process (`--middleware`), which has the key in its environment.
"""

import hmac
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

from npo_cli.errors import NpoError
from npo_cli.inference.base import AdapterHandle
from npo_cli.inference.vllm_common import VllmLimits
from npo_cli.inference.vllm_local import VLLM_HINT, lora_options


def lora_flags(adapters: AdapterHandle, limits: VllmLimits) -> list[str]:
    """Slots for adapters beside the base, as options of the server."""
    options = lora_options(adapters, limits)
    sizes = ["--max-lora-rank", str(options["max_lora_rank"]), "--max-loras", str(options["max_loras"])]
    return ["--enable-lora", *sizes, "--lora-target-modules", *options["lora_target_modules"]]


def max_connections(limits: VllmLimits) -> int:
    """Connections open at one time: as many requests as all copies together may batch."""
    return limits.max_num_seqs * limits.data_parallel_size


def open_http_session(limits: VllmLimits) -> Any:
    """One set of connections, with a key that only this process knows."""
    try:
        import requests
        from requests.adapters import HTTPAdapter
    except ImportError as error:
        raise NpoError("engine.kind=vllm_server needs vllm, which is not installed", VLLM_HINT) from error
    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_connections=1, pool_maxsize=max_connections(limits)))
    session.trust_env = False  # a proxy for the world is none for this machine
    session.headers["Authorization"] = f"Bearer {secrets.token_hex(16)}"
    return session


def find_free_port() -> int:
    """One that nobody on this machine listens to now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def parse_output(answer: dict[str, Any]) -> Any:
    """A server's answer in the shape that vLLM has in process."""
    first = answer["choices"][0]
    contents = (first.get("logprobs") or {}).get("content") or ()
    places = [{place["token_id"]: SimpleNamespace(logprob=place["logprob"])} for place in contents]
    spans = [SimpleNamespace(version=span["version"]) for span in first.get("weight_versions") or ()]
    said = SimpleNamespace(
        token_ids=first["token_ids"], finish_reason=first["finish_reason"], logprobs=places, weight_versions=spans
    )
    prompt = [
        None if place is None else {int(token): SimpleNamespace(**entry) for token, entry in place.items()}
        for place in answer.get("prompt_logprobs") or ()
    ]
    asked = SimpleNamespace(lora_name=answer["model"]) if answer.get("model") else None
    read = answer.get("prompt_token_ids")
    return SimpleNamespace(outputs=[said], prompt_logprobs=prompt, prompt_token_ids=read, lora_request=asked)


Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class ApiKeyMiddleware:
    """ASGI middleware: without the key, 401."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass on what carries the key, and what is no request (the server's own start and end)."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "http" and not hmac.compare_digest(given, self.expected):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)
