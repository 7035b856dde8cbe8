"""What every engine must do, for each registered engine that runs here and for one that this test adds."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from npo_cli.config.engine import EngineSettings
from npo_cli.config.loading import load_recipe
from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import (
    Engine,
    LogprobRequest,
    ModelHandle,
    Sample,
    SampleRequest,
    check_engines,
    check_samples,
    open_engine,
)
from npo_cli.inference.transformers_engine import TransformersEngine
from npo_cli.policy.model import Policy, load_policy
from npo_cli.registry import ENGINES
from tests.helpers.runs import train
from tests.inference.vllm_models import make_handle, make_requests, perturb_weights


class CopyEngine(Engine):
    """A whole engine in one class: it samples from a copy of the model, and gets new weights by a weight sync."""

    name = "copy"

    def __init__(self, settings: EngineSettings, handle: ModelHandle) -> None:
        super().__init__(settings, handle)
        self.model = copy.deepcopy(handle.model)
        own = replace(handle, model=self.model)
        self.sampler = TransformersEngine(settings, own)

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        self.model.load_state_dict(model.state_dict())
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        return self.sampler.generate(requests, temperature=temperature, max_new_tokens=max_new_tokens)

    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        return self.sampler.compute_logps(requests)


class StaleEngine(CopyEngine):
    """An engine that accepts new weights without using them."""

    name = "stale"

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        self.version = version


class ShortEngine(TransformersEngine):
    """An engine that leaves out the last response."""

    name = "short"

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        return super().generate(requests, temperature=temperature, max_new_tokens=max_new_tokens)[:-1]


AVAILABLE = [name for name in ENGINES.names() if ENGINES.get(name).status({}).is_available]


@pytest.fixture(autouse=True)
def plug_ins() -> Iterator[None]:
    with ENGINES.registered(CopyEngine), ENGINES.registered(StaleEngine):
        yield


@pytest.fixture
def policy() -> Policy:
    return load_policy(ModelSettings(threads=1))


def open_kind(kind: str, policy: Policy) -> Engine:
    engine = open_engine(EngineSettings(kind=kind), make_handle(policy))
    engine.update_weights(policy.model, version="first")
    return engine


@pytest.mark.parametrize("kind", ENGINES.names())
def test_engine_class_has_its_registered_name_and_a_status(kind: str):
    engine = ENGINES.get(kind)
    assert issubclass(engine, Engine)
    assert engine.name == kind
    assert kind in {status.kind for status in check_engines({})}


@pytest.mark.parametrize("kind", [*AVAILABLE, "copy"])
def test_engine_samples_what_its_logprobs_say(kind: str, policy: Policy):
    engine = open_kind(kind, policy)
    requests = make_requests(policy, "321+654=", "12+9=", num_slots=3)
    samples = engine.generate(requests, temperature=1.0, max_new_tokens=8)
    assert [(each.prompt_id, each.slot) for each in samples] == [(each.prompt_id, each.slot) for each in requests]
    for sample in samples:
        assert 1 <= len(sample.response_ids) == len(sample.logps) <= 8
        assert sample.finished == (sample.response_ids[-1] in policy.eos_ids)
    logps = engine.compute_logps(
        [
            LogprobRequest(prompt_ids=request.prompt_ids, response_ids=sample.response_ids)
            for request, sample in zip(requests, samples, strict=True)
        ]
    )
    for sample, found in zip(samples, logps, strict=True):
        assert found == pytest.approx(sample.logps, abs=1e-4)
    engine.close()
    engine.close()


@pytest.mark.parametrize("kind", [*AVAILABLE, "copy"])
def test_engine_gives_a_seed_the_same_response_in_any_batch(kind: str, policy: Policy):
    engine = open_kind(kind, policy)
    requests = make_requests(policy, "321+654=", "12+9=", num_slots=3)
    together = engine.generate(requests, temperature=1.0, max_new_tokens=8)
    alone = [engine.generate([request], temperature=1.0, max_new_tokens=8)[0] for request in requests]
    assert [each.response_ids for each in alone] == [each.response_ids for each in together]
    engine.close()


@pytest.mark.parametrize("kind", [*AVAILABLE, "copy"])
def test_engine_uses_new_weights_after_a_weight_sync(kind: str, policy: Policy):
    engine = open_kind(kind, policy)
    request = LogprobRequest(prompt_ids=(3, 2, 1), response_ids=(9, 12, 7))
    (before,) = engine.compute_logps([request])
    perturb_weights(policy, by=0.2)
    engine.update_weights(policy.model, version="second")
    (after,) = engine.compute_logps([request])
    assert engine.version == "second"
    assert (torch.tensor(before) - torch.tensor(after)).abs().max() > 1e-3
    with torch.no_grad():
        expected = torch.log_softmax(policy.model(torch.tensor([(3, 2, 1, 9, 12, 7)])).logits[0, 2:5], dim=-1)
    assert after == pytest.approx([expected[place, token].item() for place, token in enumerate((9, 12, 7))], abs=1e-4)
    engine.close()


def test_engine_from_a_plug_in_trains_and_equals_the_built_in_one(tmp_path: Path):
    rewards = {}
    for kind in ("transformers", "copy"):
        steps = train(tmp_path / kind, f"engine.kind={kind}", "train.num_steps=2")
        rewards[kind] = [step.metrics["reward"] for step in steps]
    assert rewards["copy"] == rewards["transformers"]
    assert len(rewards["copy"]) == 2


def test_engine_that_ignores_new_weights_is_refused_as_stale(tmp_path: Path):
    with pytest.raises(RunFailed, match="match the previous weights"):
        train(tmp_path / "run", "engine.kind=stale", "train.lr=0.05")


def test_engine_must_return_a_sample_per_request_with_a_log_probability_per_token(tmp_path: Path):
    with ENGINES.registered(ShortEngine), pytest.raises(RunFailed, match="15 samples for 16 requests"):
        train(tmp_path / "run", "engine.kind=short")
    request = SampleRequest(prompt_id="a", prompt_ids=(1,), slot=0, seed=0)
    right = Sample(
        prompt_id="a", slot=0, response_ids=(4, 2), logps=(-1.0, -2.0), mean_entropy=1.0, text="4", finished=True
    )
    check_samples([request], [right], kind="copy")
    for wrong, message in (
        (replace(right, logps=(-1.0,)), "1 log-probabilities for 2 tokens"),
        (replace(right, response_ids=(), logps=()), "0 log-probabilities for 0 tokens"),
        (replace(right, slot=1), "in another order"),
    ):
        with pytest.raises(RunFailed, match=message):
            check_samples([request], [wrong], kind="copy")
    with pytest.raises(RunFailed, match="2 tokens for a request of at most 1"):
        check_samples([replace(request, max_new_tokens=1)], [right], kind="copy")


def test_engine_without_support_for_images_or_adapters_is_refused():
    with pytest.raises(NpoError, match=r"engine\.kind=copy does not support images"):
        CopyEngine.validate(EngineSettings(), uses_adapters=False, uses_images=True)
    with pytest.raises(NpoError, match=r"engine\.kind=copy does not support LoRA adapters") as caught:
        CopyEngine.validate(EngineSettings(), uses_adapters=True, uses_images=False)
    able = [kind for kind in ENGINES.built_in if ENGINES.get(kind).serves_adapters]
    assert caught.value.hint == f"set engine.kind={' or '.join(able)}"


def test_engine_kind_that_is_unknown_gets_the_nearest_name():
    with pytest.raises(NpoError, match=r"engine\.kind=vlm is not a known engine: did you mean vllm\?"):
        load_recipe("micro", ["engine.kind=vlm"])
