"""A model at an address, asked over real HTTP: what is sent, what is tried again, what ends it."""

import time

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.openai_client import OpenAIClient, RequestLimits, TextRequest, validate_url
from npo_cli.types.rollouts import Message, Prompt
from tests.inference.openai_server import ServerState, run_server

NOW = {"Retry-After": "0"}


def endpoint(served: ServerState, model: str = "teacher", **changes: float) -> OpenAIClient:
    patience = RequestLimits(**{"concurrency": 2, "timeout": 5.0, "retries": 2} | changes)
    return OpenAIClient(url=served.url, model=model, limits=patience)


def wanted(text: str = "1+1=", seed: int = 3) -> TextRequest:
    prompt = Prompt(prompt_id="p", answer="2", text=text)
    return TextRequest(prompt=prompt, seed=seed, temperature=0.5, max_new_tokens=9)


def echo(body: dict) -> dict:
    return {"text": f"<{body['prompt']}>", "finish_reason": "stop", "usage": {"completion_tokens": 4}}


def test_plain_text_is_completed_with_a_seed_a_temperature_and_a_limit():
    with run_server(echo) as served:
        (answer,) = endpoint(served).generate([wanted()])
    assert served.paths == ["/v1/completions"]
    assert served.bodies == [
        {"prompt": "1+1=", "model": "teacher", "temperature": 0.5, "max_tokens": 9, "seed": 3},
    ]
    assert (answer.text, answer.finished, answer.num_tokens) == ("<1+1=>", True, 4)


def test_messages_are_answered_and_a_length_limit_is_no_end():
    def chat(body: dict) -> dict:
        return {"message": {"role": "assistant", "content": body["messages"][-1]["content"]}, "finish_reason": "length"}

    prompt = Prompt(prompt_id="p", answer="2", messages=(Message(role="user", content="one and one?"),))
    request = TextRequest(prompt=prompt, seed=1, temperature=1.0, max_new_tokens=4)
    with run_server(chat) as served:
        (answer,) = endpoint(served).generate([request])
    assert served.paths == ["/v1/chat/completions"]
    assert served.bodies[0]["messages"] == [{"role": "user", "content": "one and one?"}]
    assert (answer.text, answer.finished, answer.num_tokens) == ("one and one?", False, None)


def test_answers_come_in_the_order_asked_and_no_more_are_under_way_than_allowed():
    def slow_first(body: dict) -> dict:
        time.sleep(0.05 if body["prompt"] == "0" else 0.01)
        return echo(body)

    with run_server(slow_first) as served:
        answers = endpoint(served, concurrency=3).generate([wanted(str(number)) for number in range(12)])
    assert [answer.text for answer in answers] == [f"<{number}>" for number in range(12)]
    assert served.max_in_flight == 3


@pytest.mark.parametrize("failure", [(429, NOW, b"slow down"), (503, NOW, b""), (500, NOW, b"oops"), (0, {}, b"")])
def test_what_may_pass_is_tried_again(failure):
    with run_server(echo, failures=[failure]) as served:
        (answer,) = endpoint(served).generate([wanted()])
    assert answer.text == "<1+1=>"
    assert len(served.bodies) == 2
    assert served.bodies[0] == served.bodies[1]


def test_a_server_that_never_recovers_ends_it_after_the_tries_allowed():
    with (
        run_server(echo, failures=[(503, NOW, b"no room")] * 9) as served,
        pytest.raises(RunFailed, match=r"was asked 3 times, and at last answered 503: no room"),
    ):
        endpoint(served).generate([wanted()])
    assert len(served.bodies) == 3


def test_the_first_failure_asks_for_no_more():
    with run_server(echo, failures=[(400, {}, b"max_tokens is too large")]) as served:
        with pytest.raises(RunFailed, match="completions answered 400: max_tokens is too large") as caught:
            endpoint(served, concurrency=1).generate([wanted(str(number)) for number in range(500)])
        assert len(served.bodies) < 500
    assert caught.value.exit_code == 1


def test_a_key_comes_from_the_environment_and_a_refusal_says_where_it_belongs(monkeypatch):
    with run_server(echo, failures=[(401, {}, b"who are you?")]) as served:
        monkeypatch.delenv("NPO_ENDPOINT_KEY", raising=False)
        with pytest.raises(RunFailed, match="answered 401: who are you") as caught:
            endpoint(served).generate([wanted()])
        monkeypatch.setenv("NPO_ENDPOINT_KEY", "open sesame")
        endpoint(served).generate([wanted()])
    assert caught.value.hint == "set NPO_ENDPOINT_KEY to the server's key"
    assert served.keys == [None, "Bearer open sesame"]


def test_half_a_character_becomes_a_question_mark_and_a_strange_count_is_no_count():
    def half(body: dict) -> dict:
        return {"text": "1\ud800", "finish_reason": "stop", "usage": {"completion_tokens": -4}}

    with run_server(half) as served:
        (answer,) = endpoint(served).generate([wanted()])
    assert (answer.text, answer.num_tokens) == ("1?", None)


def test_a_key_that_no_header_can_hold_is_told_without_being_shown(monkeypatch):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", "open\nsesame")
    with run_server(echo) as served:
        with pytest.raises(NpoError, match="NPO_ENDPOINT_KEY holds characters") as caught:
            endpoint(served).generate([wanted()])
        assert served.bodies == []
    assert "sesame" not in caught.value.message


def test_a_redirect_is_not_followed_so_that_no_other_address_sees_the_key(monkeypatch):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", "secret")
    with run_server(echo) as elsewhere, run_server(echo) as served:
        served.failures.append((307, {"Location": f"{elsewhere.url}/completions"}, b""))
        with pytest.raises(RunFailed, match="answered 307"):
            endpoint(served).generate([wanted()])
        assert elsewhere.keys == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"<html>hello</html>", "did not answer in JSON"),
        (b'{"choices": []}', "answered something else than OpenAI's API does"),
        (b"[1]", "answered something else than OpenAI's API does"),
        (b'{"choices": [{"text": 7}]}', "answered with a text that is none"),
        (b"[" * 200_000, "did not answer in JSON"),
    ],
)
def test_an_answer_that_is_none_ends_it(broken, message):
    with run_server(echo, broken=broken) as served, pytest.raises(RunFailed, match=message):
        endpoint(served).generate([wanted()])


def test_a_server_that_hangs_is_given_up_after_its_time():
    def hang(body: dict) -> dict:
        time.sleep(1.0)
        return echo(body)

    with run_server(hang) as served, pytest.raises(RunFailed, match="was asked once, and at last could not be reached"):
        endpoint(served, timeout=0.1, retries=0).generate([wanted()])


def test_nobody_at_the_address_and_a_name_that_is_not_served_are_told_at_once():
    with run_server(echo) as served:
        endpoint(served).check_model()
        with pytest.raises(NpoError, match="has no model 'oracle'; it has: teacher") as caught:
            endpoint(served, model="oracle").check_model()
        assert caught.value.hint == "--model teacher"
        served.failures.append((404, {}, b"no such page"))
        endpoint(served, model="oracle").check_model()
    with pytest.raises(RunFailed, match=r"could not be reached: .*refused"):
        endpoint(served, retries=0).check_model()


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:8000", "ftp://127.0.0.1/v1", "http://", "http://x:99999/v1", "http://a b/v1", "file:///etc/passwd"],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(NpoError, match="is no address"):
        validate_url(text)


@pytest.mark.parametrize("text", ["http://me:key@127.0.0.1/v1", "http://127.0.0.1/v1?key=1", "http://127.0.0.1/v1#key"])
def test_an_address_that_is_kept_in_a_file_holds_no_secret(text):
    with pytest.raises(NpoError, match="without name, password, query or fragment") as caught:
        validate_url(text)
    assert caught.value.hint == "put the key into the environment as NPO_ENDPOINT_KEY"


def test_a_slash_at_the_end_means_nothing():
    assert validate_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"
