"""Progress inside a step with vLLM: requests that end are reported while others still run.

A stand-in drives the bar, or answers the requests, as vLLM does; with `-m vllm` the engines themselves are asked.
"""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from npo_cli import activity
from npo_cli.activity import Activity
from npo_cli.inference.base import Sample
from npo_cli.inference.vllm_local import VllmEngine
from npo_cli.inference.vllm_server import VllmServer
from npo_cli.policy.model import Policy
from npo_cli.registry import ENGINES
from tests.inference.test_vllm_local import sync_of
from tests.inference.vllm_models import make_engine, make_handle, make_requests, make_settings, tied_policy

KINDS = ("vllm", "vllm_server")
TEXTS = ("321+654=", "12+9=")
VERSION = "v0"
TOKEN = 3


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tied_policy()


@pytest.fixture
def activities(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Activity]]:
    """What an engine reports, as often as it can."""
    monkeypatch.setattr(activity, "SECONDS_BETWEEN_REPORTS", 0.0)
    heard: list[Activity] = []
    activity.listen(heard.append)
    yield heard
    activity.listen(None)


class StandInLlm:
    """`vllm.LLM.generate`: a bar over the requests while they are added, then one that counts those that end."""

    llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def generate(self, inputs: list, params: list, *, lora_request: object, use_tqdm: Any) -> list:
        """One token per request; without a bar nothing is counted."""
        if use_tqdm:
            assert len(list(use_tqdm(inputs, desc="Adding requests"))) == len(inputs)
            bar = use_tqdm(total=len(inputs), desc="Processed prompts", dynamic_ncols=True, postfix="est. speed")
            for _ in inputs:
                bar.update(1)
            bar.close()
        completion = SimpleNamespace(
            token_ids=[TOKEN],
            finish_reason="length",
            logprobs=[{TOKEN: SimpleNamespace(logprob=-0.5)}],
            weight_versions=[SimpleNamespace(version=VERSION)],
        )
        return [SimpleNamespace(outputs=[completion], lora_request=None) for _ in inputs]


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One token, in the form of the server's `inference/v1/generate`."""
    assert path == "inference/v1/generate"
    return {
        "choices": [
            {
                "token_ids": [TOKEN],
                "finish_reason": "length",
                "logprobs": {"content": [{"token_id": TOKEN, "logprob": -0.5}]},
                "weight_versions": [{"version": VERSION}],
            }
        ]
    }


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine of the kind in `request.param` around the stand-in."""
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda **fields: fields
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(VllmEngine, "_start", lambda self, folder: StandInLlm())
    monkeypatch.setattr(VllmServer, "_start", lambda self: None)
    monkeypatch.setattr(VllmServer, "_post", lambda self, path, body=None: answer(path, body or {}))
    engine = ENGINES.get(request.param)(make_settings(request.param), make_handle(policy))
    engine.version = VERSION
    yield engine
    engine.close()


def sample_all(engine: Any, policy: Policy) -> list[Sample]:
    return engine.generate(make_requests(policy, *TEXTS), temperature=1.0, max_new_tokens=18)


def assert_counted(activities: list[Activity], num_requests: int) -> None:
    """Every number of ended requests, from none to all, under the name of rollouts."""
    assert {(one.name, one.total) for one in activities} == {("rollouts", num_requests)}
    counts = [one.done for one in activities]
    assert counts == sorted(counts)
    assert set(counts) == set(range(num_requests + 1))


@pytest.mark.parametrize("stand_in", KINDS, indirect=True)
def test_ended_requests_of_vllm_are_reported_and_change_no_sample(stand_in, policy, activities):
    samples = sample_all(stand_in, policy)
    assert_counted(activities, len(samples))
    activity.listen(None)
    heard = list(activities)
    assert sample_all(stand_in, policy) == samples
    assert activities == heard


@pytest.mark.parametrize("stand_in", ["vllm_server"], indirect=True)
def test_tokens_of_the_vllm_server_are_counted_as_responses_arrive(stand_in, policy, activities):
    samples = sample_all(stand_in, policy)
    assert [one.tokens for one in activities] == [one.done for one in activities]
    assert activities[-1].tokens == sum(len(sample.response_ids) for sample in samples)


@pytest.mark.parametrize("stand_in", ["vllm"], indirect=True)
def test_the_bar_given_to_vllm_draws_nothing(stand_in, policy, activities, capfd):
    sample_all(stand_in, policy)
    assert capfd.readouterr() == ("", "")


@pytest.mark.vllm
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_reports_its_rollouts_inside_a_step(policy, activities, kind):
    engine = make_engine(kind, policy)
    try:
        sync_of(policy, engine).sync_weights(0)
        activities.clear()
        samples = sample_all(engine, policy)
    finally:
        engine.close()
    assert {(one.name, one.total) for one in activities} == {("rollouts", len(samples))}
    counts = [one.done for one in activities]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(samples))
    assert len(set(counts)) > 2
