"""The client of OpenAI-compatible servers, over real HTTP: what is sent, what is retried, what is an error."""

import html
import json
import signal
import subprocess
import sys
import time
import traceback
from threading import Event
from urllib.parse import quote

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference import openai_client
from npo_cli.inference.openai_client import OpenAIClient, RequestLimits, TextRequest, validate_url
from npo_cli.types.rollouts import Message, Prompt
from tests.helpers.warm_process import wait_until
from tests.inference.openai_server import ServerState, run_server

RETRY_AT_ONCE = {"Retry-After": "0"}


def open_client(served: ServerState, model: str = "teacher", **changes: float) -> OpenAIClient:
    limits = RequestLimits(**{"concurrency": 2, "timeout": 5.0, "retries": 2} | changes)
    return OpenAIClient(url=served.url, model=model, limits=limits)


def text_request(text: str = "1+1=", seed: int = 3) -> TextRequest:
    prompt = Prompt(prompt_id="p", answer="2", text=text)
    return TextRequest(prompt=prompt, seed=seed, temperature=0.5, max_new_tokens=9)


def echo(body: dict) -> dict:
    return {"text": f"<{body['prompt']}>", "finish_reason": "stop", "usage": {"completion_tokens": 4}}


def test_client_sends_plain_text_to_the_completions_endpoint():
    with run_server(echo) as served:
        (answer,) = open_client(served).generate([text_request()])
    assert served.paths == ["/v1/completions"]
    assert served.bodies == [
        {"prompt": "1+1=", "model": "teacher", "temperature": 0.5, "max_tokens": 9, "seed": 3},
    ]
    assert (answer.text, answer.finished, answer.num_tokens) == ("<1+1=>", True, 4)


def test_client_sends_messages_to_the_chat_endpoint_and_reports_truncation():
    def chat(body: dict) -> dict:
        return {"message": {"role": "assistant", "content": body["messages"][-1]["content"]}, "finish_reason": "length"}

    prompt = Prompt(prompt_id="p", answer="2", messages=(Message(role="user", content="one and one?"),))
    request = TextRequest(prompt=prompt, seed=1, temperature=1.0, max_new_tokens=4)
    with run_server(chat) as served:
        (answer,) = open_client(served).generate([request])
    assert served.paths == ["/v1/chat/completions"]
    assert served.bodies[0]["messages"] == [{"role": "user", "content": "one and one?"}]
    assert (answer.text, answer.finished, answer.num_tokens) == ("one and one?", False, None)


def test_client_keeps_the_order_and_the_concurrency_limit():
    def slow_first(body: dict) -> dict:
        time.sleep(0.05 if body["prompt"] == "0" else 0.01)
        return echo(body)

    with run_server(slow_first) as served:
        answers = open_client(served, concurrency=3).generate([text_request(str(number)) for number in range(12)])
    assert [answer.text for answer in answers] == [f"<{number}>" for number in range(12)]
    assert served.max_in_flight == 3


@pytest.mark.parametrize(
    "failure",
    [(429, RETRY_AT_ONCE, b"slow down"), (503, RETRY_AT_ONCE, b""), (500, RETRY_AT_ONCE, b"oops"), (0, {}, b"")],
)
def test_client_retries_after_a_temporary_error(failure):
    with run_server(echo, failures=[failure]) as served:
        (answer,) = open_client(served).generate([text_request()])
    assert answer.text == "<1+1=>"
    assert len(served.bodies) == 2
    assert served.bodies[0] == served.bodies[1]


def test_client_stops_after_the_allowed_number_of_retries():
    with (
        run_server(echo, failures=[(503, RETRY_AT_ONCE, b"no room")] * 9) as served,
        pytest.raises(RunFailed, match=r"status 503: no room \(3 attempts\)"),
    ):
        open_client(served).generate([text_request()])
    assert len(served.bodies) == 3


def test_client_cancels_the_other_requests_after_a_failure():
    with run_server(echo, failures=[(400, {}, b"max_tokens is too large")]) as served:
        with pytest.raises(RunFailed, match="completions: status 400: max_tokens is too large") as caught:
            open_client(served, concurrency=1).generate([text_request(str(number)) for number in range(500)])
        assert len(served.bodies) < 500
    assert caught.value.exit_code == 1


def test_client_takes_its_key_from_the_environment(monkeypatch):
    with run_server(echo, failures=[(401, {}, b"who are you?")]) as served:
        monkeypatch.delenv("NPO_ENDPOINT_KEY", raising=False)
        with pytest.raises(RunFailed, match="status 401: who are you") as caught:
            open_client(served).generate([text_request()])
        monkeypatch.setenv("NPO_ENDPOINT_KEY", "open sesame")
        open_client(served).generate([text_request()])
    assert caught.value.hint == "set NPO_ENDPOINT_KEY to the server's key"
    assert served.keys == [None, "Bearer open sesame"]


def test_client_replaces_half_a_surrogate_pair_and_ignores_an_invalid_token_count():
    def half(body: dict) -> dict:
        return {"text": "1\ud800", "finish_reason": "stop", "usage": {"completion_tokens": -4}}

    with run_server(half) as served:
        (answer,) = open_client(served).generate([text_request()])
    assert (answer.text, answer.num_tokens) == ("1?", None)


def test_client_refuses_an_invalid_key_without_showing_it(monkeypatch):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", "open\nsesame")
    with run_server(echo) as served:
        with pytest.raises(NpoError, match="NPO_ENDPOINT_KEY contains characters") as caught:
            open_client(served).generate([text_request()])
        assert served.bodies == []
    assert "sesame" not in caught.value.message


def test_client_follows_no_redirect_so_the_key_reaches_no_other_host(monkeypatch):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", "secret")
    with run_server(echo) as elsewhere, run_server(echo) as served:
        served.failures.append((307, {"Location": f"{elsewhere.url}/completions"}, b""))
        with pytest.raises(RunFailed, match="status 307"):
            open_client(served).generate([text_request()])
        assert elsewhere.keys == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"<html>hello</html>", "the response is not JSON"),
        (b'{"choices": []}', "not in the OpenAI format"),
        (b"[1]", "not in the OpenAI format"),
        (b'{"choices": [{"text": 7}]}', "the completion is not a string"),
        (b"[" * 200_000, "the response is not JSON"),
    ],
)
def test_client_refuses_a_malformed_response(broken, message):
    with run_server(echo, broken=broken) as served, pytest.raises(RunFailed, match=message):
        open_client(served).generate([text_request()])


def test_client_times_out():
    def hang(body: dict) -> dict:
        time.sleep(1.0)
        return echo(body)

    with (
        run_server(hang) as served,
        pytest.raises(RunFailed, match=r"no response: timed out after 0.1 s \(1 attempts\)"),
    ):
        open_client(served, timeout=0.1, retries=0).generate([text_request()])


def test_check_model_finds_a_wrong_address_or_model_name():
    with run_server(echo) as served:
        open_client(served).check_model()
        with pytest.raises(NpoError, match="has no model 'oracle'; it has: teacher") as caught:
            open_client(served, model="oracle").check_model()
        assert caught.value.hint == "name the model teacher"
        served.failures.append((404, {}, b"no such page"))
        open_client(served, model="oracle").check_model()
    with pytest.raises(RunFailed, match=r"no response: .*refused"):
        open_client(served, retries=0).check_model()


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:8000", "ftp://127.0.0.1/v1", "http://", "http://x:99999/v1", "http://a b/v1", "file:///etc/passwd"],
)
def test_validate_url_refuses_what_is_not_an_http_url(text):
    with pytest.raises(NpoError, match="is not a URL"):
        validate_url(text)


@pytest.mark.parametrize("text", ["http://me:key@127.0.0.1/v1", "http://127.0.0.1/v1?key=1", "http://127.0.0.1/v1#key"])
def test_validate_url_refuses_secrets(text):
    with pytest.raises(NpoError, match="must not contain a name, password, query or fragment") as caught:
        validate_url(text)
    assert caught.value.hint == "put the key into the environment variable NPO_ENDPOINT_KEY"


def test_validate_url_removes_a_final_slash():
    assert validate_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"


def test_client_stops_reading_a_response_that_is_too_long(monkeypatch):
    monkeypatch.setattr(openai_client, "MAX_RESPONSE_BYTES", 1000)
    with (
        run_server(echo, broken=b" " * 2000) as served,
        pytest.raises(RunFailed, match="the response is too long"),
    ):
        open_client(served, retries=0).generate([text_request()])


ECHO_KEY = 'sk-Secret/"0123456789"'
FORMS = [ECHO_KEY, ECHO_KEY.lower(), json.dumps(ECHO_KEY), html.escape(ECHO_KEY), quote(ECHO_KEY, safe="")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("status", [400, 401, 503])
def test_client_redacts_its_key_in_error_bodies(monkeypatch, form, status):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", ECHO_KEY)
    body = (380 * "." + f"Bearer {form} is unknown").encode()  # the message is cut inside the key
    with run_server(echo, failures=[(status, {}, body)]) as served, pytest.raises(RunFailed) as caught:
        open_client(served, retries=0).generate([text_request()])
    shown = "".join(traceback.format_exception(caught.value)).lower()
    assert f"status {status}" in shown
    assert "secret" not in shown


def test_client_redacts_its_key_in_broken_headers(monkeypatch):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", ECHO_KEY)
    raw = f"HTTP/1.1 400 Bad\r\nAuthorization Bearer {ECHO_KEY}\r\n\r\n".encode()
    with run_server(echo, raw=raw) as served, pytest.raises(RunFailed, match="no response") as caught:
        open_client(served, retries=0).generate([text_request()])
    assert "secret" not in "".join(traceback.format_exception(caught.value)).lower()


def test_client_redacts_its_key_in_model_names_and_completions(monkeypatch):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", ECHO_KEY)
    with run_server(lambda _: {"text": f"my key is {ECHO_KEY}"}, model=f"model-{ECHO_KEY}") as served:
        with pytest.raises(NpoError, match=r"it has: model-\[key\]") as caught:
            open_client(served).check_model()
        (answer,) = open_client(served).generate([text_request()])
    assert "Secret" not in caught.value.hint
    assert answer.text == "my key is [key]"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"." * 1000, id="headers"),
        pytest.param(b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n" + b"." * 1000, id="error body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 1000, id="response"),
    ],
)
def test_client_has_one_deadline_for_all_of_a_request(raw):
    # one byte every 0.05 s: no single read is late
    with (
        run_server(echo, raw=raw, drip=True) as served,
        pytest.raises(RunFailed, match=r"timed out after 0\.4 s"),
    ):
        open_client(served, retries=0, timeout=0.4).generate([text_request()])


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from tests.inference.test_openai_client import OpenAIClient, RequestLimits, text_request
limits = RequestLimits(concurrency=4, timeout=600.0, retries=9)
OpenAIClient(url=sys.argv[1], model="teacher", limits=limits).generate([text_request(str(n)) for n in range(8)])
"""


def test_client_ends_at_ctrl_c_while_requests_hang():
    release = Event()

    def hang(body: dict) -> dict:
        release.wait(60)
        return echo(body)

    with run_server(hang) as served:
        child = subprocess.Popen([sys.executable, "-c", INTERRUPTED, served.url], stderr=subprocess.PIPE)
        try:
            wait_until(lambda: len(served.bodies) == 4)
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=20)  # far less than the 600 s of a request
        finally:
            child.kill()
            release.set()
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    assert child.returncode == -signal.SIGINT
