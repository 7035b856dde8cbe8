"""A model behind an address that speaks OpenAI's language (vLLM, SGLang, llama.cpp, Ollama, ...), asked for text.

It is no engine of the policy: it takes no weights and tells no log-probabilities that could be charged. One request is
one sample, with a seed of its own: several at once (`n`) is what half of such servers pass over in silence. Only the
standard library is needed.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from threading import Event
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError, RunFailed
from npo_cli.types.rollouts import Prompt

KEY_VARIABLE = "NPO_ENDPOINT_KEY"
RETRYABLE_STATUS_CODES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Answers that may be others in a moment."""
INITIAL_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
MAX_RESPONSE_BYTES = 64 << 20
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """One answer wanted."""

    prompt: Prompt
    seed: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCompletion:
    """One answer, in words."""

    text: str
    finished: bool
    """The model ended by itself."""
    num_tokens: int | None
    """Of the server's own counting; None where it does not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """How a server is treated."""

    concurrency: int
    """Requests under way at the same time."""
    timeout: float
    """Seconds that one answer may take."""
    retries: int
    """Further tries after a refusal that may pass."""


class RetryableError(Exception):
    """A refusal that may pass."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the server asks for."""


class _NoRedirect(HTTPRedirectHandler):
    """A key is shown to the address that was named, and to no other."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAIClient:
    """One model at one address."""

    url: str
    """Up to and with `/v1`."""
    model: str
    limits: RequestLimits

    @on_main_rank
    def check_model(self) -> None:
        """Ask for the list of models, so that a wrong address or name is told before anything is written.

        A server that has no such list is believed.
        """
        with self._opened() as opener:
            try:
                found = self._patiently(opener, "models")
            except RunFailed as error:
                if isinstance(error.__cause__, HTTPError) and error.__cause__.code in (404, 405, 501):
                    return
                raise
        listed = found.get("data") if isinstance(found, dict) else None
        names = [each.get("id") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        if names and self.model not in names:
            known = ", ".join(map(str, names[:8]))
            raise NpoError(f"{self.url} has no model {self.model!r}; it has: {known}", f"--model {names[0]}")

    @on_main_rank
    def generate(self, requests: Sequence[TextRequest]) -> list[TextCompletion]:
        """One answer a request, in order; a few are under way at a time. The first failure stops them all."""
        stop = Event()
        with self._opened() as opener:
            pool = ThreadPoolExecutor(self.limits.concurrency, thread_name_prefix="endpoint")
            try:
                return list(pool.map(lambda request: self._answered(opener, request, stop), requests))
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _answered(self, opener: OpenerDirector, request: TextRequest, stop: Event) -> TextCompletion:
        path, body = self._body(request)
        found = self._patiently(opener, path, body=body, stop=stop)
        try:
            choice = found["choices"][0]
            text = choice["text"] if request.prompt.text is not None else choice["message"]["content"]
            num_tokens = (found.get("usage") or {}).get("completion_tokens")
            finished = choice.get("finish_reason") == "stop"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RunFailed(f"{self.url}/{path} answered something else than OpenAI's API does", RETRY_HINT) from error
        if not isinstance(text, str | None):
            raise RunFailed(f"{self.url}/{path} answered with a text that is none", RETRY_HINT)
        is_count = isinstance(num_tokens, int) and not isinstance(num_tokens, bool) and num_tokens >= 0
        # JSON can spell half a character, which no tokenizer takes.
        whole = (text or "").encode("utf-8", "replace").decode()
        return TextCompletion(text=whole, finished=finished, num_tokens=num_tokens if is_count else None)

    def _body(self, request: TextRequest) -> tuple[str, dict[str, Any]]:
        """Plain text is completed, messages are answered."""
        settings = {
            "model": self.model,
            "temperature": request.temperature,
            "max_tokens": request.max_new_tokens,
            "seed": request.seed,
        }
        if request.prompt.text is not None:
            return "completions", {"prompt": request.prompt.text, **settings}
        turns = [{"role": message.role, "content": message.content} for message in request.prompt.messages]
        return "chat/completions", {"messages": turns, **settings}

    def _patiently(
        self, opener: OpenerDirector, path: str, *, body: Mapping[str, Any] | None = None, stop: Event | None = None
    ) -> Mapping[str, Any]:
        """Try again after what may pass, waiting twice as long each time, or as long as the server asks."""
        stop = stop or Event()
        wait = INITIAL_BACKOFF_SECONDS
        for tries_left in range(self.limits.retries, -1, -1):
            try:
                return self._once(opener, path, body=body)
            except RetryableError as error:
                if not tries_left or stop.is_set():
                    times = "once" if not self.limits.retries else f"{self.limits.retries + 1} times"
                    raise RunFailed(f"{self.url}/{path} was asked {times}, and at last {error}", RETRY_HINT) from error
                asked_for = wait if error.retry_after is None else error.retry_after
                stop.wait(min(asked_for, MAX_BACKOFF_SECONDS))
                wait *= 2
        raise AssertionError("the last try ends in one way or the other")

    def _once(self, opener: OpenerDirector, path: str, *, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", **_key()}
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data=data, headers=headers)
        try:
            with closing(opener.open(request, timeout=self.limits.timeout)) as answer:
                return json.loads(_whole(answer, deadline=time.monotonic() + self.limits.timeout))
        except HTTPError as error:
            self._refused(path, error)
        except (ValueError, RecursionError) as error:
            raise RunFailed(f"{self.url}/{path} did not answer in JSON", RETRY_HINT) from error
        except (OSError, HTTPException) as error:
            said = getattr(error, "reason", None) or error
            raise RetryableError(f"could not be reached: {said or type(error).__name__}") from error

    def _refused(self, path: str, error: HTTPError) -> NoReturn:
        """What may pass is tried again; anything else ends it, in the server's own words."""
        with error:
            try:
                said = error.read(400).decode(errors="replace").strip()
            except (OSError, HTTPException):
                said = ""
        told = f"answered {error.code}" + (f": {said}" if said else "")
        if error.code in RETRYABLE_STATUS_CODES:
            raise RetryableError(told, retry_after=_seconds(error.headers.get("Retry-After"))) from error
        hint = f"set {KEY_VARIABLE} to the server's key" if error.code in (401, 403) else RETRY_HINT
        raise RunFailed(f"{self.url}/{path} {told}", hint) from error

    @contextmanager
    def _opened(self) -> Iterator[OpenerDirector]:
        """A proxy for the world is none for this machine."""
        handlers = [_NoRedirect(), *([ProxyHandler({})] if urlsplit(self.url).hostname in LOCAL_HOSTS else [])]
        with closing(build_opener(*handlers)) as opener:
            yield opener


RETRY_HINT = "look at the server, then give the same command again: it goes on where it stopped"


def validate_url(text: str) -> str:
    """An address as it may be kept in a file: http or https, and no secret in it."""
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound or not text.isascii() or not text.isprintable() or " " in text:
        raise NpoError(f"--from {text} is no address", "--from http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise NpoError(
            "--from takes an address without name, password, query or fragment: it is kept in the run directory",
            f"put the key into the environment as {KEY_VARIABLE}",
        )
    return text.rstrip("/")


def _key() -> dict[str, str]:
    """The header that shows the key, where there is one."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise NpoError(f"{KEY_VARIABLE} holds characters that no key has", "set it to the key alone, or unset it")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _whole(answer: HTTPResponse, *, deadline: float) -> bytes:
    """The body, unless it is endless or comes by drops."""
    parts, size = [], 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_RESPONSE_BYTES or time.monotonic() > deadline:
            raise TimeoutError("its answer did not end")
    return b"".join(parts)


def _seconds(text: str | None) -> float | None:
    """Retry-After as seconds; a date is passed over."""
    return float(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 6 else None
