"""Client of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, ...), for external guide models and teachers.

Not an `Engine`: the server has its own weights. Of sampled text its log-probabilities are not used; those of given
token ids, which vLLM returns, are what a dense target's teacher says. One request is one sample with its own seed,
because many such servers ignore the parameter `n`.

Requests run in one event loop instead of threads: a deadline or Ctrl-C cancels them wherever they wait, while a thread
that waits in `recv` cannot be stopped, and Python joins it before it exits.
"""

import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from npo_cli.api_key import KEY_VARIABLE, read_key, redact_key
from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError, RunFailed
from npo_cli.types.rollouts import Prompt

Answer = TypeVar("Answer")
RETRYABLE_STATUS_CODES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
NO_MODEL_LIST_STATUS_CODES = frozenset({404, 405, 501})
"""Statuses of servers that do not list their models."""
INITIAL_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
MAX_RESPONSE_BYTES = 64 << 20
MAX_ERROR_BYTES = 64 << 10
MAX_ERROR_CHARACTERS = 400
MIN_SECRET_LENGTH = 8
"""A shorter key, such as `x` or `EMPTY`, is not redacted in completions."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
RETRY_HINT = "check the server, then repeat the command: it continues where it stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """One response to sample."""

    prompt: Prompt
    seed: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCompletion:
    """One sampled response, as text."""

    text: str
    finished: bool
    """Ended by the model, not by the length limit."""
    num_tokens: int | None
    """As counted by the server; None if it does not report it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredToken:
    """A token of a given text under the server's model."""

    logp: float
    """Of the token itself, in nats at temperature 1."""
    text: str | None
    """As the server decodes it; None if it does not."""
    top: Mapping[int, float]
    """Log-probabilities of the most probable tokens at this position by id, the highest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Load and patience."""

    concurrency: int
    """Simultaneous requests."""
    timeout: float
    """Seconds per attempt, from connecting to the last byte of the response."""
    retries: int
    """Further attempts after an error that may be temporary."""


class ResponseError(Exception):
    """A request failed: an HTTP status (`status`), or no complete response (None)."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        """Seconds to wait, if the server says so."""

    @property
    def is_temporary(self) -> bool:
        """Whether another attempt may succeed."""
        return self.status is None or self.status in RETRYABLE_STATUS_CODES


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAIClient:
    """One model at one address."""

    url: str
    """Up to and including `/v1`."""
    model: str
    limits: RequestLimits

    @on_main_rank
    def check_model(self) -> None:
        """Check address and model name against the server's list of models, before anything is written.

        A server without such a list is accepted.
        """
        try:
            found = asyncio.run(self._get_models())
        except RunFailed as error:
            if isinstance(error.__cause__, ResponseError) and error.__cause__.status in NO_MODEL_LIST_STATUS_CODES:
                return
            raise
        listed = found.get("data") if isinstance(found, dict) else None
        names = (
            [redact_key(str(each.get("id"))) for each in listed if isinstance(each, dict)]
            if isinstance(listed, list)
            else []
        )
        if names and self.model not in names:
            known = ", ".join(names[:8])
            raise NpoError(f"{self.url} has no model {self.model!r}; it has: {known}", f"name the model {names[0]}")

    @on_main_rank
    def generate(self, requests: Sequence[TextRequest]) -> list[TextCompletion]:
        """One completion per request, in order. The first failure cancels the rest."""
        return asyncio.run(self._complete_all(requests))

    def score(self, texts: Sequence[tuple[int, ...]], *, top_k: int) -> list[list[ScoredToken]]:
        """Each token of the texts, which are token ids, with the `top_k` most probable ones at its position. The first
        token, which nothing predicts, has log-probability 0 and none.

        This is vLLM's `prompt_logprobs`; each rank may ask for texts of its own.
        """
        return asyncio.run(self._gather([partial(self._score, ids=ids, top_k=top_k) for ids in texts]))

    async def _score(self, http: httpx.AsyncClient, *, ids: tuple[int, ...], top_k: int) -> list[ScoredToken]:
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k}
        found = await self._request(http, "completions", body=body)
        try:
            _, *rows = found["choices"][0]["prompt_logprobs"]
            scored = [_parse_scored_token(row, token_id, top_k) for row, token_id in zip(rows, ids[1:], strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise RunFailed(
                f"{self.url}/completions: the response has no prompt_logprobs of its {len(ids)} tokens",
                "serve the teacher with vLLM, whose completions have them",
            ) from error
        return [ScoredToken(logp=0.0, text=None, top={}), *scored]

    async def _get_models(self) -> Any:
        async with self._open() as http:
            return await self._request(http, "models")

    async def _complete_all(self, requests: Sequence[TextRequest]) -> list[TextCompletion]:
        return await self._gather([partial(self._complete, request=request) for request in requests])

    async def _gather(self, calls: Sequence[Callable[[httpx.AsyncClient], Awaitable[Answer]]]) -> list[Answer]:
        """The answers in order, `concurrency` requests at a time."""
        slots = asyncio.Semaphore(self.limits.concurrency)

        async def run(http: httpx.AsyncClient, call: Callable[[httpx.AsyncClient], Awaitable[Answer]]) -> Answer:
            async with slots:
                return await call(http)

        async with self._open() as http:
            tasks = [asyncio.create_task(run(http, call)) for call in calls]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _open(self) -> httpx.AsyncClient:
        """A connection pool. Redirects are errors, so the key reaches no other host; local hosts need no proxy."""
        return httpx.AsyncClient(
            headers=_auth_header(),
            timeout=None,  # `_attempt` has one deadline for all of a request
            limits=httpx.Limits(max_connections=self.limits.concurrency),
            follow_redirects=False,
            trust_env=urlsplit(self.url).hostname not in LOCAL_HOSTS,
        )

    async def _complete(self, http: httpx.AsyncClient, request: TextRequest) -> TextCompletion:
        """Plain text goes to the completions endpoint, messages to chat completions."""
        prompt = request.prompt
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            "max_tokens": request.max_new_tokens,
            "seed": request.seed,
        }
        if prompt.text is not None:
            path, body["prompt"] = "completions", prompt.text
        else:
            path = "chat/completions"
            body["messages"] = [{"role": message.role, "content": message.content} for message in prompt.messages]
        found = await self._request(http, path, body=body)
        try:
            choice = found["choices"][0]
            text = choice["text"] if prompt.text is not None else choice["message"]["content"]
            num_tokens = (found.get("usage") or {}).get("completion_tokens")
            finished = choice.get("finish_reason") == "stop"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RunFailed(f"{self.url}/{path}: the response is not in the OpenAI format", RETRY_HINT) from error
        if not isinstance(text, str | None):
            raise RunFailed(f"{self.url}/{path}: the completion is not a string", RETRY_HINT)
        is_count = isinstance(num_tokens, int) and not isinstance(num_tokens, bool) and num_tokens >= 0
        # JSON can contain half of a surrogate pair, which no tokenizer accepts.
        text = redact_key((text or "").encode("utf-8", "replace").decode(), min_length=MIN_SECRET_LENGTH)
        return TextCompletion(text=text, finished=finished, num_tokens=num_tokens if is_count else None)

    async def _request(self, http: httpx.AsyncClient, path: str, *, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded response, with retries and exponential backoff, or the delay that the server asks for."""
        url, backoff = f"{self.url}/{path}", INITIAL_BACKOFF_SECONDS
        for retries_left in range(self.limits.retries, -1, -1):
            try:
                return await self._attempt(http, url, body)
            except ResponseError as error:
                if not error.is_temporary:
                    hint = f"set {KEY_VARIABLE} to the server's key" if error.status in (401, 403) else RETRY_HINT
                    raise RunFailed(f"{url}: {error}", hint) from error
                if not retries_left:
                    raise RunFailed(f"{url}: {error} ({self.limits.retries + 1} attempts)", RETRY_HINT) from error
                await asyncio.sleep(
                    min(backoff if error.retry_after is None else error.retry_after, MAX_BACKOFF_SECONDS)
                )
                backoff *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, http: httpx.AsyncClient, url: str, body: Mapping[str, Any] | None) -> Any:
        """One deadline over connection, headers, error bodies and response: httpx limits only the time per read."""
        content = bytearray()
        try:
            async with (
                asyncio.timeout(self.limits.timeout),
                http.stream("GET" if body is None else "POST", url, json=body) as response,
            ):
                limit = MAX_RESPONSE_BYTES if response.is_success else MAX_ERROR_BYTES
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > limit:
                        break
        except TimeoutError:
            raise ResponseError(f"no response: timed out after {self.limits.timeout:g} s") from None
        except httpx.HTTPError as error:
            # Without the cause: its text is shown in tracebacks and may have the key.
            raise ResponseError(f"no response: {redact_key(_describe_failure(error))}") from None
        if not response.is_success:
            text = redact_key(content.decode(errors="replace"))[:MAX_ERROR_CHARACTERS].strip()
            raise ResponseError(
                f"status {response.status_code}" + (f": {text}" if text else ""),
                status=response.status_code,
                retry_after=_parse_seconds(response.headers.get("Retry-After")),
            )
        if len(content) > MAX_RESPONSE_BYTES:
            raise ResponseError("the response is too long")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RunFailed(f"{url}: the response is not JSON", RETRY_HINT) from error


def _parse_scored_token(row: Mapping[str, Any], token_id: int, top_k: int) -> ScoredToken:
    """From `{id: {logprob, decoded_token}}`, which has the token itself besides the most probable ones."""
    logps = {int(name): float(each["logprob"]) for name, each in row.items()}
    if not all(map(math.isfinite, logps.values())):
        raise ValueError("a log-probability is not a finite number")
    order = sorted(logps, key=lambda name: (-logps[name], name))[:top_k]
    text = row[str(token_id)].get("decoded_token")
    return ScoredToken(logp=logps[token_id], text=text, top={name: logps[name] for name in order})


def validate_url(text: str) -> str:
    """An address that may be written to files: http or https, without a secret in it."""
    try:
        parts = urlsplit(text)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_valid = False
    if not is_valid or not text.isascii() or not text.isprintable() or " " in text:
        raise NpoError(f"{text} is not a URL of a server", "for example endpoint:http://127.0.0.1:8000/v1#MODEL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise NpoError(
            "a server's URL must not contain a name, password, query or fragment: it is written to the run directory",
            f"put the key into the environment variable {KEY_VARIABLE}",
        )
    return text.rstrip("/")


def _auth_header() -> dict[str, str]:
    """The Authorization header; empty without a key."""
    key = read_key()
    if not key.isascii() or not key.isprintable():
        raise NpoError(f"{KEY_VARIABLE} contains characters that are not allowed in a key", "set it to the key alone")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _describe_failure(error: BaseException) -> str:
    """The operating system's reason for a failed connection, such as `Connection refused`, else the error itself."""
    text, cause = str(error) or type(error).__name__, error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno)
        group = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else None
        cause = group or cause.__cause__ or cause.__context__
    return text


def _parse_seconds(text: str | None) -> float | None:
    """Retry-After in seconds; None for a date."""
    return float(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 6 else None
