"""A dense target's teacher behind a server that answers as vLLM's completions do, beside the same model in memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.guides.dense_target import ActiveTarget, open_teacher
from npo_cli.guides.served_teacher import ServedTeacher
from npo_cli.policy.model import Policy, load_policy
from npo_cli.rollout.batch import build_batch
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.training.update import Updater, build_training_samples
from tests.helpers.runs import open_session_at, tiny_recipe, train
from tests.inference.openai_server import ServerState, run_server
from tests.training.test_dense_targets import with_target
from tests.training.test_update import Recorder, distance, norm


def serve_policy(policy: Policy, *, decode: Callable[[int], str] | None = None) -> Callable[[dict[str, Any]], dict]:
    """vLLM's answer: per position the K most probable tokens and the token itself, as `{id: {logprob, ...}}`."""
    text_of = decode or (lambda token_id: policy.tokenizer.decode([token_id]))

    @torch.no_grad()
    def say(body: dict[str, Any]) -> dict[str, Any]:
        ids, rows = body["prompt"], [None]
        logps_LW = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, token_id in enumerate(ids[1:]):
            top = [token_id, *logps_LW[position].topk(body["prompt_logprobs"]).indices.tolist()]
            found = logps_LW[position]
            rows.append({str(one): {"logprob": found[one].item(), "decoded_token": text_of(one)} for one in top})
        return {"text": "", "finish_reason": "length", "prompt_logprobs": rows}

    return say


@pytest.fixture(scope="module")
def served() -> Iterator[ServerState]:
    with run_server(serve_policy(load_policy(ModelSettings(threads=1)))) as server:
        yield server


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 4, "policy_gradient": False},
        {"top_k": 3, "divergence": "js", "privileged": None, "rollouts": "all"},
        {"kind": "token_weight"},
    ],
    ids=str,
)
def test_served_teacher_teaches_what_the_same_model_in_memory_does(scout, served, tmp_path, changes):
    """Packed rows that share prompts included: several responses have one distribution of the first token."""
    session = open_session_at(scout, 4)
    log = RolloutLog(tmp_path / "rollouts.jsonl")
    batch = build_batch(session, log, seed_name="t", step=5, position=0, active_guide=None)
    entries = [replace(entry, advantages=(1.0, -0.4, 0.7, 0.0)) for entry in batch.selected]
    gradients, stats = [], []
    for spec in (f"endpoint:{served.url}#teacher", "model:micro-base"):
        opened = with_target(session, teacher=spec, **changes)
        teacher = open_teacher(opened.run, opened.recipe, opened.policy, parent="main", fork_step=4)
        assert isinstance(teacher, ServedTeacher) is spec.startswith("endpoint")
        target = ActiveTarget(settings=opened.recipe.target, teacher=teacher, fork_step=4).at_step(5)
        recorder: Any = Recorder(opened.policy.model)
        samples = build_training_samples(opened.policy, entries, opened.recipe.guide.inject, target=target)
        report = Updater(opened.policy, recorder, opened.recipe).take_step(samples, lr=1.0, target=target)
        gradients.append(recorder.gradients[-1])
        stats.append(report.stats.metrics())
    assert norm(gradients[1]) > 1e-3
    assert distance(*gradients) < 1e-4 * norm(gradients[1])
    assert stats[0] == pytest.approx(stats[1], abs=1e-4)


def test_served_teacher_of_a_run(served, tmp_path):
    settings = ("target.kind=distribution", f"target.teacher=endpoint:{served.url}#teacher", "train.num_steps=2")
    reports = train(tmp_path / "run", *settings, "target.top_k=5")
    # It is the policy itself before the first update.
    assert abs(reports[0].metrics["target/kl"]) < 1e-5 < reports[1].metrics["target/kl"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "returns the most probable tokens only"),
        (("target.top_k=5", "sampling.temperature=0.8"), "those of temperature 1, not 0.8"),
    ],
)
def test_served_teacher_is_refused_where_it_cannot_say_what_is_needed(served, tmp_path, overrides, message):
    spec = f"target.teacher=endpoint:{served.url}#teacher"
    with pytest.raises(NpoError, match=message):
        list(train_run(tmp_path / "run", tiny_recipe("target.kind=distribution", spec, *overrides)))
    assert not (tmp_path / "run").exists()


def refused_by(say: Callable[[dict[str, Any]], dict], root: Path) -> str:
    with run_server(say) as server, pytest.raises((NpoError, RunFailed)) as caught:
        spec = f"target.teacher=endpoint:{server.url}#teacher"
        list(train_run(root, tiny_recipe("target.kind=distribution", spec, "target.top_k=5")))
    assert not root.exists()
    return caught.value.message


def test_served_teacher_with_other_tokens_or_without_log_probabilities_is_refused(tmp_path):
    policy = load_policy(ModelSettings(threads=1))
    other = serve_policy(policy, decode=lambda token_id: f"<{token_id}>")
    assert "its probabilities are of other tokens" in refused_by(other, tmp_path / "run")
    plain = lambda body: {"text": "", "finish_reason": "length"}  # noqa: E731
    assert "has no prompt_logprobs" in refused_by(plain, tmp_path / "run")
    few = lambda body: serve_policy(policy)(body | {"prompt_logprobs": 2})  # noqa: E731
    assert "returned fewer than 5 tokens" in refused_by(few, tmp_path / "run")
