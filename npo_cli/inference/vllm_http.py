"""HTTP parts of the vLLM server engine: port, session, options, responses, and a middleware that checks the API key.

vLLM itself checks the key on some endpoints only, not on those that change weights. The server process loads the
middleware (`--middleware`) and has the key in its environment.
"""

import hmac
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

from npo_cli.config.engine import EngineSettings, VllmSettings
from npo_cli.errors import NpoError
from npo_cli.inference.base import AdapterHandle
from npo_cli.inference.vllm_common import VLLM_HINT
from npo_cli.inference.vllm_local import lora_options


def lora_flags(adapters: AdapterHandle, vllm: VllmSettings) -> list[str]:
    """The server's options for serving LoRA adapters."""
    options = lora_options(adapters, vllm)
    sizes = ["--max-lora-rank", str(options["max_lora_rank"]), "--max-loras", str(options["max_loras"])]
    return ["--enable-lora", *sizes, "--lora-target-modules", *options["lora_target_modules"]]


def max_connections(settings: EngineSettings) -> int:
    """Simultaneous connections: the batch size of all data-parallel copies together."""
    return settings.max_num_seqs * settings.vllm.data_parallel_size


def open_http_session(num_connections: int) -> Any:
    """A connection pool, with a random API key."""
    try:
        import requests
        from requests.adapters import HTTPAdapter
    except ImportError as error:
        raise NpoError("engine.kind=vllm_server needs vllm, which is not installed", VLLM_HINT) from error
    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_connections=1, pool_maxsize=num_connections))
    session.trust_env = False  # no proxy: the server is on this machine
    session.headers["Authorization"] = f"Bearer {secrets.token_hex(16)}"
    return session


def find_free_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def parse_output(body: dict[str, Any]) -> Any:
    """The server's response in the form of vLLM's in-process output."""
    first = body["choices"][0]
    contents = (first.get("logprobs") or {}).get("content") or ()
    logprobs = [{entry["token_id"]: SimpleNamespace(logprob=entry["logprob"])} for entry in contents]
    spans = [SimpleNamespace(version=span["version"]) for span in first.get("weight_versions") or ()]
    completion = SimpleNamespace(
        token_ids=first["token_ids"], finish_reason=first["finish_reason"], logprobs=logprobs, weight_versions=spans
    )
    prompt_logprobs = [
        None if entries is None else {int(token): SimpleNamespace(**entry) for token, entry in entries.items()}
        for entries in body.get("prompt_logprobs") or ()
    ]
    lora = SimpleNamespace(lora_name=body["model"]) if body.get("model") else None
    return SimpleNamespace(
        outputs=[completion],
        prompt_logprobs=prompt_logprobs,
        prompt_token_ids=body.get("prompt_token_ids"),
        lora_request=lora,
    )


Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class ApiKeyMiddleware:
    """ASGI middleware that answers 401 to requests without the API key."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass on requests with the key, and events that are not HTTP (startup, shutdown)."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "http" and not hmac.compare_digest(given, self.expected):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)
