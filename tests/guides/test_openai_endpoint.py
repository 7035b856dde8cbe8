"""Guide caches from a model at an address."""

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.guides import build_cache as guide_cache
from npo_cli.guides.sources.retokenize import MIN_CUT_CHARACTERS
from npo_cli.policy.model import Policy
from npo_cli.storage.guide_cache import read_guide_prompts
from tests.helpers.runs import copy_run, open_session_at, sample, trajectories
from tests.helpers.teachers import correct_response
from tests.inference.openai_server import run_server

NAMED = {"name": "given"}


@pytest.fixture(scope="module")
def run_and_prompts(scout):
    """The prompts of steps 3 and 4, and the learner's tokenizer."""
    session = open_session_at(scout, 2)
    return session.policy, session.prompts_between(8, 16)


@pytest.fixture
def root(scout, tmp_path):
    return copy_run(scout, tmp_path / "run")


def right_to(prompts):
    """A server's teacher: the right scratchpad of whatever it is asked."""
    by_text = {prompt.text: prompt for prompt in prompts}

    def say(body: dict) -> dict:
        text = correct_response(by_text[body["prompt"]])
        return {"text": text, "finish_reason": "stop", "usage": {"completion_tokens": 7}}

    return say


def test_openai_source_retokenizes_responses_and_counts_its_own_tokens(root, run_and_prompts):
    _, prompts = run_and_prompts
    with run_server(right_to(prompts)) as served:
        arguments = {"source": f"endpoint:{served.url}#teacher", **NAMED}
        info = sample(root, **arguments)
        seeds = [body["seed"] for body in served.bodies]
    found = trajectories(root, "given")
    assert {prompt.prompt_id: correct_response(prompt) for prompt in prompts} == {
        prompt_id: kept.text for prompt_id, kept in found.items()
    }
    # 8 prompts, solved in the first round of 2, 7 tokens by the server's count
    assert (info.num_samples, info.num_tokens) == (16, 16 * 7)
    assert len(set(seeds)) == 16
    assert (info.source.options, info.guide_digest, info.has_logps) == (
        {"url": served.url, "model": "teacher"},
        "",
        False,
    )
    assert {kept.source for kept in found.values()} == {"teacher"}


def test_openai_source_resumed_after_a_kill_requests_only_the_rest(scout, run_and_prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(guide_cache, "CHUNK_PROMPTS", 3)
    _, prompts = run_and_prompts
    straight, broken = (copy_run(scout, tmp_path / name) for name in ("straight", "broken"))
    with run_server(right_to(prompts)) as served:
        arguments = {"source": f"endpoint:{served.url}#teacher", **NAMED}
        sample(straight, **arguments)
        whole = len(served.bodies)
        # The first chunk of three is heard; then the server is gone for good.
        say = served.say
        served.bodies.clear()

        def say_a_little(body: dict) -> dict:
            if len(served.bodies) > 6:
                served.failures.append((400, {}, b"out of order"))
            return say(body)

        served.say = say_a_little
        # One request at a time: none is under way when the first one fails.
        with pytest.raises(RunFailed, match="status 400: out of order"):
            sample(broken, "guide.endpoint.concurrency=1", **arguments)
        served.say, first = say, len(read_guide_prompts(broken / "guides" / "given"))
        served.failures.clear()
        served.bodies.clear()
        sample(broken, **arguments)
        assert (whole, first, len(served.bodies)) == (16, 3, 10)
    one, other = ((root / "guides/given/rollouts.jsonl").read_bytes() for root in (straight, broken))
    assert one == other


def test_openai_source_without_the_model_is_refused(root, run_and_prompts):
    before = sorted(root.rglob("*"))
    with run_server(right_to(run_and_prompts[1])) as served:
        arguments = {"source": f"endpoint:{served.url}#oracle", **NAMED}
        with pytest.raises(NpoError, match="has no model 'oracle'; it has: teacher"):
            sample(root, **arguments)
    assert sorted(root.rglob("*")) == before


def test_openai_source_cuts_a_huge_response_before_it_is_tokenized(root, run_and_prompts, monkeypatch):
    lengths = []
    encode = Policy.encode_response
    monkeypatch.setattr(Policy, "encode_response", lambda self, text: lengths.append(len(text)) or encode(self, text))
    with run_server(lambda _: {"text": "1+1=" * 500_000, "finish_reason": "stop"}) as served:
        info = sample(root, "guide.cache.samples_per_prompt=1", source=f"endpoint:{served.url}#teacher", **NAMED)
    assert set(lengths) == {MIN_CUT_CHARACTERS}  # of 2,000,000
    assert info.num_samples == len(lengths) == 8
    assert trajectories(root, "given") == {}
