"""vLLM for real, on a CPU with a tiny model: what it samples, and that wrong weights never pass."""

import math
import tempfile

import pytest
import torch

from npo_cli.config.loading import load_recipe
from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import RunFailed
from npo_cli.inference import vllm_common
from npo_cli.inference.base import LogprobRequest
from npo_cli.inference.sync_check import named_tensors
from npo_cli.inference.vllm_local import VllmEngine
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.packing import TokenRow
from npo_cli.session.weight_sync import WeightSync
from tests.inference.vllm_models import make_engine, make_requests, perturb_weights, tied_policy, untied_policy

pytestmark = pytest.mark.vllm
PROMPTS = ("321+654=", "12+9=", "....1+2=")


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    policy = tied_policy() if request.param == "tied" else untied_policy(tmp_path_factory.mktemp("untied"))
    engine = make_engine("vllm", policy)
    yield policy, engine
    engine.close()


@pytest.fixture
def synced(pair):
    """Policy and engine in step at the base weights, whatever the test before did."""
    policy, engine = pair
    state = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    sync = sync_of(policy, engine)
    sync.sync_weights(0)
    yield policy, engine, sync
    policy.model.load_state_dict(state)


def sync_of(policy: Policy, engine: VllmEngine) -> WeightSync:
    ids = [tuple(policy.tokenizer(text).input_ids) for text in PROMPTS]
    rows = tuple(TokenRow(prompt_ids=row[:1], response_ids=row[1:]) for row in ids)
    return WeightSync(recipe=load_recipe("micro", []), policy=policy, engine=engine, check_rows=rows, run_nonce="ab")


def trainers(policy: Policy, samples, *, temperature: float = 1.0) -> list[list[float]]:
    """The trainer's log-probabilities of the same tokens."""
    rows = [
        TokenRow(prompt_ids=tuple(policy.tokenizer(each.prompt_id).input_ids), response_ids=each.response_ids)
        for each in samples
    ]
    with torch.no_grad():
        scores = policy.score(rows, temperature=temperature, chunk_tokens=4096).logps_NT
    return [scores[i, : len(row.response_ids)].tolist() for i, row in enumerate(rows)]


def largest_gap(ours, theirs) -> float:
    return max(abs(a - b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_logprobs_equal_the_trainers_at_the_same_temperature(synced, temperature):
    policy, engine, _ = synced
    samples = engine.generate(make_requests(policy, *PROMPTS), temperature=temperature, max_new_tokens=18)
    assert largest_gap([each.logps for each in samples], trainers(policy, samples, temperature=temperature)) < 1e-4
    assert {each.finished for each in samples} <= {True, False}
    for each in samples:
        assert each.finished == (each.response_ids[-1] in policy.eos_ids)
        assert each.text == policy.tokenizer.decode(each.response_ids[:-1] if each.finished else each.response_ids)
        assert each.mean_entropy == pytest.approx(-sum(each.logps) / len(each.logps))


def test_vllm_compute_logps_equal_the_trainers(synced):
    policy, engine, _ = synced
    samples = engine.generate(make_requests(policy, *PROMPTS, num_slots=2), temperature=1.0, max_new_tokens=18)
    requests = [
        LogprobRequest(prompt_ids=tuple(policy.tokenizer(each.prompt_id).input_ids), response_ids=each.response_ids)
        for each in samples
    ]
    assert largest_gap(engine.compute_logps(requests), trainers(policy, samples)) < 1e-4


def test_vllm_response_depends_on_its_seed_only(synced):
    policy, engine, _ = synced
    requests = make_requests(policy, *PROMPTS)
    together = engine.generate(requests, temperature=1.0, max_new_tokens=18)
    apart = [engine.generate([each], temperature=1.0, max_new_tokens=18)[0] for each in requests[::5]]
    backwards = engine.generate(requests[::-1], temperature=1.0, max_new_tokens=18)[::-1]
    assert apart == together[::5]
    assert backwards == together
    assert len({each.response_ids for each in together}) > 6


def test_vllm_samples_more_prompt_tokens_than_one_pass_holds(synced):
    """350 prompts in one batch: more tokens than one pass holds. A CPU's random stream cannot be rewound."""
    policy, engine, _ = synced
    requests = make_requests(policy, "12345+67890=", num_slots=350)
    assert len(engine.generate(requests, temperature=1.0, max_new_tokens=2)) == 350


def test_vllm_uses_new_weights_and_resets_the_prefix_cache(synced):
    policy, engine, sync = synced
    requests = make_requests(policy, *PROMPTS)
    before = engine.generate(requests, temperature=1.0, max_new_tokens=18)
    perturb_weights(policy, by=0.05)
    sync.sync_weights(1)
    after = engine.generate(requests, temperature=1.0, max_new_tokens=18)
    assert [each.response_ids for each in after] != [each.response_ids for each in before]
    assert largest_gap([each.logps for each in after], trainers(policy, after)) < 1e-4
    # what did not change is not sent
    version = engine.version
    sync.sync_weights(1)
    assert engine.version is version
    sync.sync_weights(2)
    assert engine.version != version


def test_vllm_without_weights_samples_nothing(pair):
    policy, engine = pair
    engine.version = None
    with pytest.raises(RunFailed, match="instead of None"):
        engine.generate(make_requests(policy, "1+2="), temperature=1.0, max_new_tokens=2)


# Weights that are wrong in every way known


def test_vllm_weight_sync_finds_a_missing_tensor_by_name(synced, monkeypatch):
    policy, _, sync = synced
    perturb_weights(policy, by=0.05)
    monkeypatch.setattr(vllm_common, "named_tensors", lambda model: without(named_tensors(model), "layers.1.mlp"))
    with pytest.raises(RunFailed, match=r"tensors missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        sync.sync_weights(1)


def test_vllm_weight_sync_finds_a_missing_tensor_by_logprobs(synced, monkeypatch):
    """vLLM takes it without a word, and keeps a mixture of two policies."""
    policy, _, sync = synced
    perturb_weights(policy, by=0.2)
    monkeypatch.setattr(vllm_common, "check_sent_tensors", lambda expected, offered: None)
    monkeypatch.setattr(vllm_common, "named_tensors", lambda model: without(named_tensors(model), "layers.1.mlp"))
    with pytest.raises(RunFailed, match="the engine may hold other weights"):
        sync.sync_weights(1)


def test_vllm_weight_sync_finds_a_stale_head(synced, monkeypatch):
    """The tied head of vLLM 0.32: the embedding is new, the head is old."""
    policy, _, sync = synced
    perturb_weights(policy, by=0.2)
    monkeypatch.setattr(vllm_common, "check_sent_tensors", lambda expected, offered: None)
    monkeypatch.setattr(vllm_common, "named_tensors", lambda model: without(named_tensors(model), "lm_head"))
    with pytest.raises(RunFailed, match=r"weight sync to step 1.* failed"):
        sync.sync_weights(1)


@pytest.mark.parametrize("by", [0.2, 0.002])
def test_vllm_weight_sync_finds_stale_weights_after_a_small_step(synced, monkeypatch, by):
    """A step of .2 % moves a log-probability by less than the tolerance; the old weights are nearer all the same."""
    policy, engine, sync = synced
    monkeypatch.setattr(engine._llm.llm_engine, "collective_rpc", lambda *args, **kwargs: None)
    perturb_weights(policy, by=by)
    with pytest.raises(RunFailed, match="match the previous weights"):
        sync.sync_weights(1)
    # nor is it believed when it is asked for the same weights again
    with pytest.raises(RunFailed, match="match the previous weights"):
        sync.sync_weights(1)


def test_vllm_weight_sync_refuses_nan(synced):
    policy, _, sync = synced
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[0] = math.nan
    with pytest.raises(RunFailed, match="tensors not finite"):
        sync.sync_weights(1)


def test_vllm_weight_sync_fails_if_the_prefix_cache_is_not_reset(synced, monkeypatch):
    policy, engine, sync = synced
    perturb_weights(policy, by=0.05)
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RunFailed, match=r"phase: weight sync.: RuntimeError: the prefix cache"):
        sync.sync_weights(1)


def test_vllm_sample_from_another_version_is_refused(synced):
    policy, engine, _ = synced
    engine._llm.update_weight_version("another's")
    with pytest.raises(RunFailed, match="sampled from weights another's instead of step 0, write"):
        engine.generate(make_requests(policy, "1+2="), temperature=1.0, max_new_tokens=2)


# Failure


def test_vllm_error_names_phase_and_cause(synced, monkeypatch):
    policy, engine, _ = synced

    def dies(*args, **kwargs):
        raise MemoryError("no more")

    monkeypatch.setattr(engine._llm, "generate", dies)
    with pytest.raises(RunFailed, match=r"vLLM failed \(phase: sample\): MemoryError: no more") as failed:
        engine.generate(make_requests(policy, "1+2="), temperature=1.0, max_new_tokens=2)
    assert "npo resume" in failed.value.hint


def test_vllm_start_error_is_reported():
    policy = load_policy(ModelSettings(threads=1))
    with pytest.raises(RunFailed, match="vLLM could not start"):
        make_engine("vllm", policy, max_model_len=100_000)


def test_vllm_close_twice_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    policy = tied_policy()
    engine = make_engine("vllm", policy)
    for _ in range(2):
        engine.close()
    assert not list(tmp_path.glob("npo-*"))
    with pytest.raises(RunFailed, match=r"vLLM is closed \(phase: sample\)"):
        engine.generate(make_requests(policy, "1+2="), temperature=1.0, max_new_tokens=2)


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}
